"""The whole chain on networks that others have written: is the packed network the trained network?

For each network and scheme: prepare all weights of linear and convolution layers (tied ones too), compare with the same
float network whose weights are λ · sign(V) written by hand, train a step, freeze the signs, convert, save, load into a
fresh float network and into a prepared one, load the state dict of the packed one, and export to ONNX and pt2. The
table has the largest difference of any of these outputs, over the largest output; "refused" is an error of the plugin
that names what cannot be done. Weights are random. The files are compared with the trained network by ``pb.export``
itself, to 1e-4.

``pip install deepinv timm transformers`` beside the torch that is there (``-c constraints.txt``), then
``python benchmarks/foreign_networks.py --output benchmarks/results/foreign_networks.md``; ``--only NAME`` runs one.
"""

from __future__ import annotations

import argparse
import copy
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pibinn_plugin as pb
from pibinn_plugin.comparison import outputs_of
from pibinn_plugin.quantizer import quantize_sign
from pibinn_plugin.schemes import SCHEMES
from pibinn_plugin.weights import one_bit_weights, quantized_weights
from pibinn_plugin.workflow import evaluation

Maker = Callable[[], nn.Module]
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class WithPhysics(nn.Module):
    """A reconstruction network with the physics that it is called with."""

    def __init__(self, network: nn.Module, physics: Any) -> None:
        super().__init__()
        self.network, self.physics = network, physics

    def forward(self, y: Tensor) -> Any:
        return self.network(y, self.physics)


class Last(nn.Module):
    """A network of which one output is compared: Hugging Face's return dataclasses with caches."""

    def __init__(self, network: nn.Module, pick: Callable[[Any], Tensor], **arguments: Any) -> None:
        super().__init__()
        self.network, self.pick, self.arguments = network, pick, arguments

    def forward(self, input: Tensor) -> Tensor:
        return self.pick(self.network(input, **self.arguments))


def deepinv_networks() -> Iterator[tuple[str, Maker, tuple[Tensor, ...]]]:
    """Denoisers, and solvers unrolled around them."""
    from deepinv import models, optim, physics

    def dncnn() -> nn.Module:
        return models.DnCNN(1, 1, depth=4, nf=8, pretrained=None)

    def inpainting() -> Any:
        torch.manual_seed(0)
        return physics.Inpainting((1, 16, 16), mask=0.5)

    def solver(algorithm: Any, tied: bool, **arguments: Any) -> Maker:
        def make() -> nn.Module:
            priors = [optim.prior.PnP(denoiser=dncnn()) for _ in range(1 if tied else 3)]
            network = algorithm(
                data_fidelity=optim.data_fidelity.L2(),
                prior=priors[0] if tied else priors,
                stepsize=0.8,
                sigma_denoiser=0.05,
                max_iter=3,
                unfold=True,
                **arguments,
            )
            return WithPhysics(network, inpainting())

        return make

    image = (torch.rand(2, 1, 16, 16),)
    yield "deepinv PGD, tied", solver(optim.PGD, True), image
    yield "deepinv PGD, untied", solver(optim.PGD, False), image
    yield "deepinv primal-dual", solver(optim.PDCP, True, stepsize_dual=0.9), image
    yield "deepinv DEQ", solver(optim.PGD, True, DEQ=True), image
    yield "deepinv DnCNN", lambda: models.DnCNN(1, 1, depth=5, nf=8, pretrained=None), image
    yield "deepinv UNet", lambda: models.UNet(1, 1, scales=2, batch_norm=True), image
    yield "deepinv DRUNet", lambda: models.DRUNet(1, 1, nc=(4, 8, 8, 8), nb=1, pretrained=None), (*image, torch.rand(2))
    yield "deepinv ICNN", lambda: models.ICNN(1, num_filters=4, num_layers=3), image
    yield "deepinv PDNet", lambda: WithPhysics(pd_net(models), inpainting()), image
    kspace = (torch.randn(2, 2, 16, 16),)
    for name, network in (("MoDL", models.MoDL), ("VarNet", models.VarNet)):

        def unrolled(network: Any = network) -> nn.Module:
            denoiser = models.DnCNN(2, 2, depth=3, nf=8, pretrained=None)
            arguments = {"num_iter": 3} if network is models.MoDL else {"num_cascades": 3}
            mri = physics.MRI(mask=(torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.5).float())
            return WithPhysics(network(denoiser, **arguments), mri)

        yield f"deepinv {name}", unrolled, kspace


def pd_net(models: Any) -> nn.Module:
    """Learned primal-dual, with deepinv's own blocks."""
    from deepinv import optim, unfolded
    from deepinv.optim.optim_iterators import CPIteration, fStep, gStep

    class Primal(gStep):
        def forward(self, x: Tensor, w: Tensor, cur_prior: Any, *unused: Any) -> Tensor:
            return cur_prior.prox(x, w[:, 0:1])

    class Dual(fStep):
        def forward(self, x: Tensor, w: Tensor, cur_data_fidelity: Any, y: Tensor, *unused: Any) -> Tensor:
            return cur_data_fidelity.prox(x, w[:, 1:2], y)

    class Iteration(CPIteration):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.g_step, self.f_step = Primal(**kwargs), Dual(**kwargs)

        def forward(
            self, X: Any, cur_data_fidelity: Any, cur_prior: Any, params: Any, y: Tensor, physics: Any, *u: Any
        ) -> Any:
            x, w = X["est"]
            w = self.f_step(w, torch.cat([physics.A(x), physics.A(x)], 1), cur_data_fidelity, y)
            x = self.g_step(x, torch.cat([physics.A_adjoint(w)] * 2, 1), cur_prior)
            return {"est": (x, w), "cost": None}

    class Prior(optim.prior.Prior):
        def __init__(self) -> None:
            super().__init__()
            self.block = models.PDNet_PrimalBlock(in_channels=2, out_channels=1, depth=3, bias=True, nf=8)

        def prox(self, x: Tensor, w: Tensor) -> Tensor:
            return self.block(x, w)

    class Fidelity(optim.data_fidelity.DataFidelity):
        def __init__(self) -> None:
            super().__init__()
            self.block = models.PDNet_DualBlock(in_channels=3, out_channels=1, depth=3, bias=True, nf=8)

        def prox(self, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
            return self.block(x, w, y)

    return unfolded.unfolded_builder(
        Iteration(),
        params_algo={"K": None},
        data_fidelity=[Fidelity() for _ in range(2)],
        prior=[Prior() for _ in range(2)],
        max_iter=2,
        custom_init=lambda y, physics: {"est": (physics.A_adjoint(y), torch.zeros_like(y))},
    )


def timm_networks() -> Iterator[tuple[str, Maker, tuple[Tensor, ...]]]:
    """Small relatives of the networks of the library."""
    import timm

    small = {"img_size": 32, "num_classes": 5}
    windows = {"depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    for name, arguments, size in (
        ("resnet18", {"num_classes": 5}, 32),
        ("beit_base_patch16_224", {**small, "embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8}, 32),
        ("vit_tiny_patch16_224", {**small, "embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8}, 32),
        ("swinv2_tiny_window8_256", {**small, **windows, "embed_dim": 16}, 32),
        ("davit_tiny", {"num_classes": 5, **windows, "embed_dims": (16, 32)}, 32),
    ):
        yield (
            f"timm {name}",
            lambda name=name, arguments=arguments: timm.create_model(name, pretrained=False, **arguments),
            (torch.randn(2, 3, size, size),),
        )


def transformers_networks() -> Iterator[tuple[str, Maker, tuple[Tensor, ...]]]:
    """Tiny models of random weights."""
    import transformers as hf

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    tokens = (torch.randint(0, 60, (2, 7)),)
    eager = {"attn_implementation": "eager"}
    bert = hf.BertConfig(vocab_size=60, **size, **eager)
    yield "transformers BERT", lambda: Last(hf.BertModel(bert), lambda o: o.last_hidden_state), tokens
    llama = hf.LlamaConfig(vocab_size=60, num_key_value_heads=2, max_position_embeddings=32, **size, **eager)
    yield "transformers Llama", lambda: Last(hf.LlamaForCausalLM(llama), lambda o: o.logits, use_cache=False), tokens
    gpt2 = hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32, **eager)
    yield "transformers GPT-2", lambda: Last(hf.GPT2LMHeadModel(gpt2), lambda o: o.logits, use_cache=False), tokens
    t5 = hf.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    encoder = hf.T5EncoderModel
    yield "transformers T5 encoder", lambda: Last(encoder(copy.deepcopy(t5)), lambda o: o.last_hidden_state), tokens
    wav2vec2 = hf.Wav2Vec2BertConfig(
        vocab_size=60,
        feature_projection_input_dim=16,
        conv_depthwise_kernel_size=3,
        apply_spec_augment=False,
        **size,
        **eager,
    )
    model = hf.Wav2Vec2BertModel
    yield (
        "transformers Wav2Vec2Bert",
        lambda: Last(model(copy.deepcopy(wav2vec2)), lambda o: o.last_hidden_state),
        (torch.randn(2, 9, 16),),
    )


def targets_of(model: nn.Module, scheme: str) -> dict[str, None]:
    """The weights of all linear and convolution layers; natively all other matrices too, but embeddings."""
    names = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            is_layer = type(module) in LAYERS and parameter_name == "weight"
            is_matrix = scheme == "native" and parameter.dim() >= 2 and not isinstance(module, nn.Embedding)
            if is_layer or (is_matrix and "weight" in parameter_name):
                names[f"{name}.{parameter_name}".removeprefix(".")] = None
    return names


def made(make: Maker, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def by_hand(make: Maker, prepared: nn.Module) -> nn.Module:
    """The float network with the values ``λ · sign(V)`` of a prepared one."""
    twin, scale = made(make, 0), pb.global_scale(prepared)().detach()
    with torch.no_grad():
        for weight in quantized_weights(prepared):
            place = weight.places[0]
            twin.get_submodule(place.module_name)._parameters[place.parameter_name].copy_(
                quantize_sign(weight.latent.detach(), scale)
            )
    return twin


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    with evaluation(model), torch.no_grad():
        return [y.detach().double() for y in outputs_of(model(*inputs))]


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    assert len(actual) == len(expected)
    largest = max(y.abs().max().item() for y in expected)
    return max((a - b).abs().max().item() for a, b in zip(actual, expected, strict=True)) / largest


def chain(make: Maker, inputs: tuple[Tensor, ...], scheme: str) -> dict[str, float | str]:
    """Each step and its difference, or the refusal that names why it cannot be taken."""
    model = made(make, 0)
    targets = targets_of(model, scheme)
    pb.prepare(model, targets, scheme)
    is_projected = isinstance(model, projecting_networks())
    steps: dict[str, float | str] = {}
    if not is_projected:
        steps["by hand"] = difference(run(model, inputs), run(by_hand(make, model), inputs))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    sum(y.square().mean() for y in outputs_of(model(*inputs)) if y.requires_grad).backward()
    optimizer.step()
    optimizer.zero_grad()
    pb.freeze_signs(model)
    trained = run(model, inputs)
    if not is_projected:
        steps["trained"] = difference(trained, run(with_buffers(by_hand_trained(make, model), model), inputs))
    packed = pb.convert(model)
    steps["convert"] = difference(run(packed, inputs), trained)
    with tempfile.TemporaryDirectory() as folder:
        path = pb.save(packed, Path(folder) / "net.safetensors")
        fresh, prepared = made(make, 1), pb.prepare(made(make, 2), targets, scheme)
        for name, other in (("load", fresh), ("load prepared", prepared)):
            steps[name] = difference(run(pb.load(path, other), inputs), trained)
        again = pb.convert(pb.prepare(made(make, 3), targets, scheme))
        again.load_state_dict(packed.state_dict())
        steps["state dict"] = difference(run(again, inputs), trained)
        assert len(one_bit_weights(again)) == len(one_bit_weights(packed))
        for format in ("onnx", "pt2"):
            try:
                pb.export(model, Path(folder) / f"net.{format}", inputs, format)
            except pb.PIBiNNError as error:
                steps[format] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
            else:
                steps[format] = 0.0
    return steps


def projecting_networks() -> tuple[type, ...]:
    """Networks that clamp their weights in each forward: without meaning on one-bit weights, but not by hand."""
    try:
        from deepinv.models import ICNN
    except ImportError:
        return ()
    return (ICNN,)


def by_hand_trained(make: Maker, model: nn.Module) -> nn.Module:
    twin = by_hand(make, model)
    own = {name: parameter for name, parameter in model.named_parameters() if "parametrizations" not in name}
    targets = {place.name for weight in quantized_weights(model) for place in weight.places}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in own and name not in targets:
                parameter.copy_(own[name])
    return twin


def with_buffers(twin: nn.Module, model: nn.Module) -> nn.Module:
    own = dict(model.named_buffers())
    with torch.no_grad():
        for name, buffer in twin.named_buffers():
            if name in own:
                buffer.copy_(own[name])
    return twin


def cell(steps: dict[str, float | str]) -> str:
    worst = max((value, name) for name, value in steps.items() if isinstance(value, float))
    refused = [f"{name} refused: {value}" for name, value in steps.items() if isinstance(value, str)]
    return "; ".join(
        [f"exact ({worst[0]:.0e})" if worst[0] < 1e-4 else f"WRONG {worst[0]:.1e} in {worst[1]}", *refused]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of a network's name")
    parser.add_argument("--output", type=Path, help="a Markdown file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for networks in (deepinv_networks, timm_networks, transformers_networks):
        for name, make, inputs in networks():
            if options.only not in name:
                continue
            cells = []
            for scheme in SCHEMES:
                start = time.time()
                try:
                    cells.append(cell(chain(make, inputs, scheme)))
                except pb.PIBiNNError as error:
                    cells.append(f"refused: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
                except Exception as error:
                    cells.append(f"WRONG: raw {type(error).__name__}: {str(error).splitlines()[0][:90]}")
                print(f"{name} | {scheme} | {cells[-1]} | {time.time() - start:.0f} s", flush=True)
            rows.append(f"| {name} | " + " | ".join(each.replace("|", "/") for each in cells) + " |")
    if options.output:
        head = "| network | " + " | ".join(SCHEMES) + " |\n|---|" + "---|" * len(SCHEMES)
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        options.output.write_text(f"{__doc__}\n{versions}\n\n{head}\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
