"""Faults of the exports."""

from fault import Fault

ONNX, PT2 = "export::test_onnx_of_weak_latents_is_the_network", "export::test_pt2_of_weak_latents_is_the_network"
REFUSED = "export::test_refused_arguments export::test_refused_models"

FAULTS = [
    Fault("export/__init__.py", "    inputs = checked_inputs(args)\n", "    inputs = tuple(args)\n", REFUSED),
    Fault("export/__init__.py", "isinstance(args, Tensor) or not args or", "not len(args) or", REFUSED),
    Fault("export/__init__.py", "if len({len(x) for x in args}) > 1 or", "if", REFUSED),
    Fault(
        "export/__init__.py",
        "verify(run, _reference(model, packed), inputs, framework.DYNAMIC_BATCH)",
        "pass",
        "export::test_a_file_that_computes_something_else_is_refused",
    ),
    Fault(
        "export/__init__.py",
        "    packed = packed.cpu().eval().requires_grad_(False)\n",
        "    packed = packed.cpu().requires_grad_(False)\n",
        "export::test_what_is_exported_is_the_network_in_evaluation_and_the_model_stays_as_it_was",
    ),
    Fault(
        "export/__init__.py",
        '        vars(module).pop("int8_activations", None)',
        "        pass",
        "int8_activations export",
    ),
    Fault(
        "export/__init__.py",
        "    _unwrap_packed_tensors(packed)\n    return",
        "    return",
        "export::test_weights_packed_by_torchao_itself_are_exported",
    ),
    Fault(
        "export/__init__.py",
        "        packed = copy_of(model)\n",
        "        packed = model\n",
        "export::test_what_is_exported_is_the_network_in_evaluation_and_the_model_stays_as_it_was",
    ),
    Fault(
        "export/__init__.py",
        "framework.write(copy.deepcopy(packed), inputs, path)",
        "framework.write(packed, inputs, path)",
        "export::test_a_writer_cannot_change_what_its_file_is_compared_with",
    ),
    Fault("export/verify.py", "for inputs in (args, others):", "for inputs in (args,):", "verify"),
    Fault("export/verify.py", "x.shape[0] + dynamic_batch", "x.shape[0]", "verify"),
    Fault(
        "export/verify.py",
        "x.flatten()[torch.randint(x.numel(), shape, generator=generator)]",
        "torch.randint(100, shape, generator=generator).to(x.dtype)",
        "verify",
    ),
    Fault(
        "export/verify.py",
        '            raise ExportError(f"the exported file does not run',
        '            return\n            raise ExportError(f"the exported file does not run',
        "verify",
    ),
    Fault(
        "export/program.py",
        "torch.cat([x, x]) if x.shape[0] == 1 else x",
        "x",
        "export::test_a_batch_of_one_is_no_constant",
    ),
    Fault("export/program.py", "        chain.original = row_major_bits(packed)\n", "        pass\n", PT2),
    Fault(
        "export/program.py",
        "compact = isinstance(packed.structure, BlockDiagonal) and packed.structure.rows is None",
        "compact = isinstance(packed.structure, BlockDiagonal)",
        PT2,
    ),
    Fault(
        "export/program.py",
        "narrow(torch.tensor(structure.row_order).argsort())",
        "narrow(torch.tensor(structure.row_order))",
        PT2,
    ),
    Fault(
        "export/program.py",
        "    for node in program.graph.nodes:\n        for key in _TRACES:\n            node.meta.pop(key, None)\n",
        "",
        "export::test_files_stay_at_one_bit_a_weight",
    ),
    Fault(
        "export/unpack.py",
        "torch.where(unpack_bits(bits, self.count), scale, -scale)",
        "torch.where(unpack_bits(bits, self.count), -scale, scale)",
        PT2,
    ),
    Fault("export/unpack.py", ".cumsum(0) - 1).clamp_min(0)", ".cumsum(0)).clamp_min(0)", PT2),
    Fault("export/unpack.py", ".cumsum(0) - 1).clamp_min(0)", ".cumsum(0) - 1)", PT2 + " " + ONNX),
    Fault(
        "export/unpack.py",
        "if scale.dtype != self.dtype:",
        "if False:",
        "export::test_layers_of_several_precisions_share_one_scale",
    ),
    Fault(
        "export/unpack.py",
        "compact or isinstance(packed.structure, Dense)",
        "compact",
        "export::test_files_stay_at_one_bit_a_weight",
        harmless="the mask of a dense weight is all True: the same values from a few more nodes",
    ),
    Fault("export/rules.py", "offset >= -self.structure.lower", "offset > -self.structure.lower", PT2),
    Fault(
        "export/rules.py",
        "dtypes = (torch.uint8, torch.int16",
        "dtypes = (torch.uint8, torch.int8, torch.int16",
        PT2,
        harmless="int8 holds nothing that uint8 does not",
    ),
    Fault(
        "export/rules.py",
        "largest <= torch.iinfo(dtype).max",
        "largest < torch.iinfo(dtype).max // 2",
        "export::test_files_stay_at_one_bit_a_weight",
        harmless="a wider dtype holds the same numbers; the sizes of files are bounded with room for it",
    ),
    Fault(
        "export/rules.py",
        ".cumsum(0)[:-1]))\n\n    @override\n    def forward(self) -> Tensor:\n        if self.is_permuted:",
        ".cumsum(0)))\n\n    @override\n    def forward(self) -> Tensor:\n        if self.is_permuted:",
        PT2,
        harmless="the last end is the number of all rows, which none reaches",
    ),
    Fault(
        "export/rules.py",
        "torch.empty_like(numbers).scatter(0, torch.tensor(order), numbers)",
        "numbers[torch.tensor(order)]",
        PT2,
    ),
    Fault("export/rules.py", ">= ends).to", "> ends).to", PT2),
    Fault(
        "export/rules.py",
        "torch.zeros(len(columns) + 1, dtype=torch.int64)",
        "torch.zeros(len(columns) + 2, dtype=torch.int64)",
        PT2,
    ),
    Fault(
        "export/rules.py",
        "sizes[0] if len(set(sizes)) == 1 and order is None else None",
        "sizes[0] if order is None else None",
        PT2,
    ),
    Fault(
        "export/onnx.py",
        "return False if any(",
        "return None if any(",
        "export::test_small_layers_are_not_unpacked_by_the_optimizer",
    ),
    Fault(
        "export/pt2.py", "    program._example_inputs = None", "    pass", "export::test_files_stay_at_one_bit_a_weight"
    ),
    Fault(
        "export/pt2.py",
        "method = zipfile.ZIP_DEFLATED if",
        "method = zipfile.ZIP_STORED if",
        "export::test_files_stay_at_one_bit_a_weight",
    ),
    Fault("export/aoti.py", 'if path.suffix != ".pt2":', "if False:", "export::test_aoti_without_a_compiler -kaoti"),
    Fault("export/qonnx_graph.py", "[0, *ends[:-1]]", "[0, *ends[1:]]", "export_brevitas"),
    Fault("export/brevitas_layers.py", "and not has_empty_blocks(target.structure)", "", "export_brevitas"),
    Fault(
        "export/float_layers.py",
        "return type(place.module) is CompactLinear and",
        "return isinstance(place.module, CompactLinear) and",
        "export_brevitas",
    ),
    Fault(
        "export/sizes.py",
        "format_module(format).write(copy.deepcopy(twin), inputs, twin_path)",
        "format_module(format).write(copy.deepcopy(packed), inputs, twin_path)",
        "export::test_size_report",
    ),
]
