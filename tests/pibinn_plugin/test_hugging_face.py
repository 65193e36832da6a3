"""A Hugging Face model: prepared, trained, packed, saved and loaded again."""

import pytest
import torch
from torch import nn

import pibinn_plugin as pb
from pibinn_plugin.schemes import SCHEMES


class Pretrained(nn.Module):
    """What of ``transformers.PreTrainedModel`` matters here."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x)

    def save_pretrained(self, folder):
        torch.save(self.state_dict(), f"{folder}/model")


def test_a_packed_model_says_how_it_is_saved(tmp_path):
    packed = pb.convert(pb.prepare(Pretrained(), {"layer.weight": None}))
    path = pb.save(packed, tmp_path / "net.safetensors")
    for model in (packed, pb.load(path, into=Pretrained())):
        with pytest.raises(pb.PIBiNNError, match=r"pb\.save.*pb\.load"):
            model.save_pretrained(tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tiny_bert_goes_the_whole_way(scheme, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model, tokens = transformers.BertModel(config), torch.randint(0, 30, (2, 5))
    pb.prepare(model, {"encoder.layer.*.dense.weight": None, "encoder.*.query.weight": None}, scheme)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(tokens).last_hidden_state.square().mean().backward()
    optimizer.step()
    packed = pb.convert(pb.freeze_signs(model.eval()))
    expected = model(tokens).last_hidden_state
    torch.testing.assert_close(packed(tokens).last_hidden_state, expected)
    config.save_pretrained(tmp_path)
    path = pb.save(packed, tmp_path / "net.safetensors")
    loaded = pb.load(path, into=transformers.BertModel(transformers.BertConfig.from_pretrained(tmp_path)).eval())
    torch.testing.assert_close(loaded(tokens).last_hidden_state, expected)


def test_torchao_config_gives_one_scale(tmp_path):
    """``transformers.TorchAoConfig`` calls ``quantize_`` once a module, with one config."""
    transformers = pytest.importorskip("transformers")
    from torchao.quantization import quantize_

    from pibinn_plugin.schemes.torchao import PIBiNNWeightOnlyConfig

    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
    )
    config = transformers.TorchAoConfig(PIBiNNWeightOnlyConfig())
    for layer in [module for module in model.encoder.modules() if type(module) is nn.Linear]:
        quantize_(layer, config.quant_type)
    assert pb.summary(model).scale_bytes == 4
