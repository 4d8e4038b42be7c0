"""Routes of real architectures, word for word; what a route says of a weight, against what the layer computes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from burnish.optim.routing import Route, Routing, param_groups, route_tensors, split_parameters

DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(architecture: str, **options: Any) -> Any:
    """A random model of a transformers class."""
    kind = getattr(transformers, architecture)
    return kind(kind.config_class(**options))


def matrices(routing: Routing) -> dict[str, str]:
    """Name -> as what, of the tensors that are orthogonalised."""
    return {route.name: route.treatment for route in routing if route.rule == "matrix"}


def reasons(routing: Routing) -> dict[str, str]:
    return {route.name: route.reason for route in routing}


def of_layers(layers: int, prefix: str, **names: str) -> dict[str, str]:
    """`{prefix.0.self_attn.q_proj.weight: ...}` of names that write `__` for a dot."""
    return {
        f"{prefix}.{layer}.{name.replace('__', '.')}": value for layer in range(layers) for name, value in names.items()
    }


def only(routing: Routing, name: str) -> Route:
    (route,) = [route for route in routing if route.name == name]
    return route


def assert_claimed_once(model: nn.Module, routing: Routing) -> None:
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [route.name for route in routing] == trainable
    assert [id(route.parameter) for route in routing] == [id(model.get_parameter(name)) for name in trainable]


LLAMA_LAYER = {
    **{f"self_attn__{name}_proj__weight": "matrix" for name in "qkvo"},
    **{f"mlp__{name}_proj__weight": "matrix" for name in ("gate", "up", "down")},
}


@pytest.mark.parametrize("tied", [True, False])
def test_u7_4_llama(tied: bool) -> None:
    model = build("LlamaForCausalLM", **DECODER, tie_word_embeddings=tied)
    routing = split_parameters(model)
    assert_claimed_once(model, routing)
    assert matrices(routing) == of_layers(2, "model.layers", **LLAMA_LAYER)
    said = reasons(routing)
    assert said["model.layers.0.input_layernorm.weight"] == said["model.norm.weight"] == "norm (LlamaRMSNorm)"
    if tied:
        assert said["model.embed_tokens.weight"] == "embedding, tied to the output head"
        assert "lm_head.weight" not in said
    else:
        assert said["model.embed_tokens.weight"] == "embedding"
        assert said["lm_head.weight"] == "output head: get_output_embeddings()"
    assert routing.note == ""


def test_u7_4_a_hidden_layer_as_large_as_the_embedding_is_still_a_matrix() -> None:
    model = build("LlamaForCausalLM", **{**DECODER, "vocab_size": 32, "intermediate_size": 32})
    said = matrices(split_parameters(model))
    assert said == of_layers(2, "model.layers", **LLAMA_LAYER)


def test_u7_4_gpt2_stores_its_layers_transposed() -> None:
    model = build("GPT2LMHeadModel", vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    routing = split_parameters(model)
    assert_claimed_once(model, routing)
    assert matrices(routing) == of_layers(
        2,
        "transformer.h",
        attn__c_attn__weight="transposed",
        attn__c_proj__weight="transposed",
        mlp__c_fc__weight="transposed",
        mlp__c_proj__weight="transposed",
    )
    said = reasons(routing)
    assert said["transformer.wte.weight"] == "embedding, tied to the output head"
    assert said["transformer.wpe.weight"] == "embedding"


def test_u7_4_qwen3_moe_stacks_experts_and_keeps_the_router_with_the_matrices() -> None:
    options = {**DECODER, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
    model = build("Qwen3MoeForCausalLM", **options, tie_word_embeddings=False)
    routing = split_parameters(model)
    assert_claimed_once(model, routing)
    assert matrices(routing) == of_layers(
        2,
        "model.layers",
        **{f"self_attn__{name}_proj__weight": "matrix" for name in "qkvo"},
        mlp__gate__weight="matrix",
        mlp__experts__gate_up_proj="stack of 8",
        mlp__experts__down_proj="stack of 8",
    )
    said = reasons(routing)
    assert said["model.layers.0.mlp.gate.weight"] == "router, a linear map to 8 experts"
    assert said["model.layers.0.self_attn.q_norm.weight"] == "norm (Qwen3MoeRMSNorm)"


def test_u7_4_gpt_oss_stores_its_experts_transposed() -> None:
    options = {**DECODER, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    model = build("GptOssForCausalLM", **options)
    routing = split_parameters(model)
    assert_claimed_once(model, routing)
    assert matrices(routing) == of_layers(
        2,
        "model.layers",
        **{f"self_attn__{name}_proj__weight": "matrix" for name in "qkvo"},
        mlp__router__weight="matrix",
        mlp__experts__gate_up_proj="stack of 4, transposed",
        mlp__experts__down_proj="stack of 4, transposed",
    )
    said = reasons(routing)
    assert said["model.layers.1.mlp.experts.down_proj_bias"] == "a vector for each of 4 experts"
    assert said["model.layers.1.mlp.router.bias"] == "bias"
    assert said["model.layers.1.self_attn.sinks"] == "vector"


def test_u7_4_llama4_experts_are_known_to_be_transposed_though_the_class_does_not_say_so() -> None:
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    config = transformers.Llama4TextConfig(num_local_experts=4, hidden_size=32, intermediate_size=32)
    assert set(matrices(split_parameters(Llama4TextExperts(config))).values()) == {"stack of 4, transposed"}


BERT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT_LAYER = {
    **{f"attention__self__{name}__weight": "matrix" for name in ("query", "key", "value")},
    "attention__output__dense__weight": "matrix",
    "intermediate__dense__weight": "matrix",
    "output__dense__weight": "matrix",
}


def test_u7_4_an_encoder_without_a_head_says_so() -> None:
    model = build("BertModel", **BERT)
    routing = split_parameters(model)
    assert_claimed_once(model, routing)
    assert matrices(routing) == {**of_layers(2, "encoder.layer", **BERT_LAYER), "pooler.dense.weight": "matrix"}
    assert routing.note == (
        "no output head was recognised: if pooler.dense.weight [32, 32] is it, pass auxiliary=['pooler.dense.weight']"
    )
    said = reasons(routing)
    assert {said[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")} == {
        "embedding"
    }


def test_u7_4_masked_language_model_and_classifier_heads() -> None:
    masked = split_parameters(build("BertForMaskedLM", **BERT))
    assert matrices(masked) == {
        **of_layers(2, "bert.encoder.layer", **BERT_LAYER),
        "cls.predictions.transform.dense.weight": "matrix",
    }
    assert reasons(masked)["bert.embeddings.word_embeddings.weight"] == "embedding, tied to the output head"
    classes = split_parameters(build("BertForSequenceClassification", **BERT, num_labels=5))
    assert reasons(classes)["classifier.weight"] == "output head: 5 outputs, as config.num_labels"
    assert matrices(classes) == {
        **of_layers(2, "bert.encoder.layer", **BERT_LAYER),
        "bert.pooler.dense.weight": "matrix",
    }


def test_u7_4_in_a_head_of_two_layers_only_the_last_is_the_head() -> None:
    # The hidden size equals the number of labels, so that the first layer of the head has as many outputs.
    said = reasons(split_parameters(build("RobertaForSequenceClassification", **BERT, num_labels=32)))
    assert said["classifier.out_proj.weight"] == "output head: 32 outputs, as config.num_labels"
    assert said["classifier.dense.weight"] == "linear layer"
    assert said["roberta.encoder.layer.1.output.dense.weight"] == "linear layer"


def test_u7_4_a_reward_model_has_one_output() -> None:
    said = reasons(split_parameters(build("LlamaForSequenceClassification", **DECODER, num_labels=1)))
    assert said["score.weight"] == "output head: 1 outputs, as config.num_labels"


def test_u7_4_vision_transformer() -> None:
    options = {**BERT, "image_size": 16, "patch_size": 4, "num_labels": 10}
    del options["vocab_size"]
    model = build("ViTForImageClassification", **options)
    routing = split_parameters(model)
    assert_claimed_once(model, routing)
    layer = {f"attention__{name}_proj__weight": "matrix" for name in "qkvo"}
    assert matrices(routing) == {
        "vit.embeddings.patch_embeddings.projection.weight": "flattened to 32 x 48",
        **of_layers(2, "vit.layers", **layer, mlp__fc1__weight="matrix", mlp__fc2__weight="matrix"),
    }
    said = reasons(routing)
    assert said["vit.embeddings.cls_token"] == "vector"
    assert said["vit.embeddings.position_embeddings"] == (
        "no known layer (position_embeddings of ViTEmbeddings): name it in matrix=[...] to orthogonalise it"
    )
    assert said["classifier.weight"] == "output head: 10 outputs, as config.num_labels"


def test_u7_4_whisper() -> None:
    sizes = {f"{part}_{size}": value for part in ("encoder", "decoder")
             for size, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    model = build(
        "WhisperForConditionalGeneration", vocab_size=96, d_model=32, num_mel_bins=8, **sizes, pad_token_id=0,
        max_source_positions=20, max_target_positions=20, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    routing = split_parameters(model)
    assert_claimed_once(model, routing)
    attention = [f"{name}_proj__weight" for name in "qkv"] + ["out_proj__weight"]
    own = {f"self_attn__{name}": "matrix" for name in attention} | {"fc1__weight": "matrix", "fc2__weight": "matrix"}
    crossed = {f"encoder_attn__{name}": "matrix" for name in attention}
    assert matrices(routing) == {
        "model.encoder.conv1.weight": "flattened to 32 x 24",
        "model.encoder.conv2.weight": "flattened to 32 x 96",
        **of_layers(2, "model.encoder.layers", **own),
        **of_layers(2, "model.decoder.layers", **own, **crossed),
    }
    assert routing.frozen == 1  # sinusoids of the encoder
    said = reasons(routing)
    assert said["model.decoder.embed_tokens.weight"] == "embedding, tied to the output head"
    assert said["model.decoder.embed_positions.weight"] == "embedding"


class Block(nn.Module):
    """A residual block of a MobileNet: pointwise, depthwise, pointwise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels, bias=False)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.project = nn.Conv2d(2 * channels, channels, 1, bias=False)


class ConvolutionalNet(nn.Module):
    """Shaped like a torchvision classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.up = nn.ConvTranspose2d(12, 6, 2, bias=False)
        self.fc = nn.Linear(6, 10)


def test_u7_4_convolutional_network() -> None:
    routing = split_parameters(ConvolutionalNet())
    assert matrices(routing) == {
        "conv1.weight": "flattened to 8 x 27",
        **of_layers(2, "layer1", expand__weight="flattened to 16 x 8", project__weight="flattened to 8 x 16"),
        "grouped.weight": "flattened to 12 x 18, split 4",
        "up.weight": "flattened to 12 x 24, transposed",
        "fc.weight": "matrix",
    }
    said = reasons(routing)
    assert said["layer1.1.depthwise.weight"] == "depthwise convolution: a kernel for each channel, no matrix"
    assert said["bn1.weight"] == said["bn1.bias"] == "norm (BatchNorm2d)"
    assert said["fc.bias"] == said["grouped.bias"] == "bias"
    assert routing.note.endswith("if fc.weight [10, 6] is it, pass auxiliary=['fc.weight']")
    named = split_parameters(ConvolutionalNet(), auxiliary=["fc.weight"])
    assert named.note == "" and reasons(named)["fc.weight"] == "named by auxiliary='fc.weight'"


def test_u7_4_a_convolution_of_one_channel_is_not_depthwise() -> None:
    assert matrices(split_parameters(nn.Conv2d(1, 8, 3))) == {"weight": "flattened to 8 x 9"}
    assert matrices(split_parameters(nn.ConvTranspose1d(8, 4, 3, groups=2))) == {}


def test_u7_4_transformer_encoder_and_attention_of_unlike_widths() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        routing = split_parameters(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 2))
    assert matrices(routing) == of_layers(
        2,
        "layers",
        self_attn__in_proj_weight="split 3",
        self_attn__out_proj__weight="matrix",
        linear1__weight="matrix",
        linear2__weight="matrix",
    )
    unlike = split_parameters(nn.MultiheadAttention(16, 4, kdim=8, vdim=12, add_bias_kv=True))
    parts = dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"), "matrix")
    assert matrices(unlike) == parts
    assert reasons(unlike)["bias_k"] == "vector"


def test_u7_4_recurrent_layers_are_split_by_gate() -> None:
    layers = nn.ModuleDict(
        {"lstm": nn.LSTM(5, 8, proj_size=3), "gru": nn.GRU(5, 8, bidirectional=True), "rnn": nn.RNN(5, 8),
         "cell": nn.LSTMCell(5, 8)}
    )  # fmt: skip
    assert matrices(split_parameters(layers)) == {
        "lstm.weight_ih_l0": "split 4",
        "lstm.weight_hh_l0": "split 4",
        "lstm.weight_hr_l0": "matrix",
        "gru.weight_ih_l0": "split 3",
        "gru.weight_hh_l0": "split 3",
        "gru.weight_ih_l0_reverse": "split 3",
        "gru.weight_hh_l0_reverse": "split 3",
        "rnn.weight_ih_l0": "matrix",
        "rnn.weight_hh_l0": "matrix",
        "cell.weight_ih": "split 4",
        "cell.weight_hh": "split 4",
    }
    assert only(split_parameters(layers), "lstm.weight_hh_l0").splits == (8, 8, 8, 8)


def test_u7_4_names_decide_nothing() -> None:
    class Trap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 4)
            self.embedding_proj = nn.Linear(4, 6)
            self.lm_head_norm = nn.Linear(6, 4)
            self.embed_conv = nn.Conv1d(4, 4, 3)
            self.weights = nn.LayerNorm((2, 4))
            self.linear = nn.Embedding(5, 4)
            self.last = nn.Linear(4, 11)

    routing = split_parameters(Trap())
    assert matrices(routing) == {
        "embedding_proj.weight": "matrix",
        "lm_head_norm.weight": "matrix",
        "embed_conv.weight": "flattened to 4 x 12",
    }
    said = reasons(routing)
    assert said["weights.weight"] == said["weights.bias"] == "norm (LayerNorm)"
    assert said["table.weight"] == said["linear.weight"] == "embedding"
    assert said["last.weight"] == "output head: 11 outputs, as many as the embedding has rows"


class SmallGPT(nn.Module):
    """A hand-written language model; block, vocabulary and width may coincide."""

    def __init__(self, vocabulary: int, block: int, width: int, *, tied: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(block, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.wte.weight


@pytest.mark.parametrize(("vocabulary", "block", "width"), [(65, 256, 32), (97, 32, 32), (32, 64, 32), (128, 8, 32)])
def test_u7_4_the_head_of_a_plain_module_by_the_rows_of_the_token_embedding(
    vocabulary: int, block: int, width: int
) -> None:
    routing = split_parameters(SmallGPT(vocabulary, block, width))
    assert set(matrices(routing)) == {"up.weight", "down.weight"}
    assert routing.note == ""


def test_u7_4_a_tied_head_of_a_plain_module_is_counted_once() -> None:
    model = SmallGPT(65, 16, 8, tied=True)
    routing = split_parameters(model)
    assert_claimed_once(model, routing)
    assert reasons(routing)["wte.weight"] == "embedding, tied to the output head"
    assert set(matrices(routing)) == {"up.weight", "down.weight"}
    positions_first = nn.ModuleDict({"wpe": nn.Embedding(16, 8), "wte": nn.Embedding(65, 8), "head": nn.Linear(8, 65)})
    positions_first["head"].weight = positions_first["wte"].weight
    said = reasons(split_parameters(positions_first))
    assert said["wte.weight"] == "embedding, tied to the output head" and said["wpe.weight"] == "embedding"


def test_u7_4_an_encoder_as_wide_as_its_vocabulary_has_no_head() -> None:
    model = SmallGPT(32, 64, 32)
    del model.head
    routing = split_parameters(model)
    # Only one layer has as many outputs as the embedding has rows here: the rule of rows cannot know better.
    assert set(matrices(routing)) == {"up.weight"}
    model.between = nn.Linear(32, 32)
    model.last = nn.Linear(16, 32)
    routing = split_parameters(model)
    assert set(matrices(routing)) == {"up.weight", "down.weight", "between.weight", "last.weight"}
    assert "if last.weight [32, 16] is it" in routing.note
    model.last = nn.Linear(32, 5)
    assert "if last.weight [5, 32] is it" in split_parameters(model).note


def test_u7_4_a_module_that_names_its_classifier() -> None:
    class Classifier(ConvolutionalNet):
        def get_classifier(self) -> nn.Module:
            return self.fc

        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    routing = split_parameters(nn.Sequential(Classifier(), nn.Linear(10, 10)))
    assert reasons(routing)["0.fc.weight"] == "output head: get_classifier()"
    assert matrices(routing)["1.weight"] == "matrix"
    assert routing.note == ""


def test_u7_4_plain_layers_and_parameters_of_no_layer() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_log = nn.Parameter(torch.zeros(6, 4))
            self.kernel = nn.Parameter(torch.zeros(2, 3, 4, 5))
            self.scale = nn.Parameter(torch.zeros(1, 1, 6))
            self.temperature = nn.Parameter(torch.zeros(()))
            self.net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))

    routing = split_parameters(Mixer())
    assert matrices(routing) == {"net.0.weight": "matrix", "net.2.weight": "matrix"}
    said = reasons(routing)
    assert said["a_log"] == "no known layer (a_log of Mixer): name it in matrix=[...] to orthogonalise it"
    assert said["scale"] == "vector" and said["temperature"] == "scalar"
    named = split_parameters(Mixer(), matrix=["a_log", "kernel"])
    assert only(named, "a_log").treatment == "matrix"
    assert only(named, "kernel").treatment == "flattened to 2 x 60"


def test_u7_4_duck_typed_linears_and_embeddings_need_the_shape_they_declare() -> None:
    class Parallel(nn.Module):
        def __init__(self, rows: int, cols: int, **declared: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(rows, cols))
            for name, value in declared.items():
                setattr(self, name, value)

    said = reasons(
        split_parameters(
            nn.ModuleDict(
                {
                    "linear": Parallel(3, 5, out_features=3, in_features=5),
                    "reversed": Parallel(5, 3, out_features=3, in_features=5),
                    "table": Parallel(7, 3, num_embeddings=7, embedding_dim=3),
                }
            )
        )
    )
    assert said["linear.weight"] == "linear layer"
    assert said["reversed.weight"].startswith("no known layer")
    assert said["table.weight"] == "embedding"


def test_u7_4_lora_factors() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = build("LlamaForCausalLM", **DECODER)
    routing = split_parameters(
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "embed_tokens"]))
    )
    base = "base_model.model.model"
    assert matrices(routing) == of_layers(
        2,
        f"{base}.layers",
        **{f"self_attn__{name}_proj__lora_{side}__default__weight": "matrix" for name in "qv" for side in "AB"},
    )
    said = reasons(routing)
    assert said[f"{base}.embed_tokens.lora_embedding_A.default"] == "LoRA factor of an embedding"
    assert said[f"{base}.layers.0.self_attn.q_proj.lora_A.default.weight"] == (
        "LoRA factor, rank 4: orthogonalised by itself"
    )
    assert said[f"{base}.layers.0.self_attn.v_proj.lora_B.default.weight"] == (
        "LoRA factor, rank 4: orthogonalised by itself"
    )
    assert routing.frozen == 2 * 9 + 3  # layers; embedding, last norm, head
    assert routing.note == ""


def test_u7_4_lora_of_convolutions_experts_and_saved_heads() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    net = peft.get_peft_model(ConvolutionalNet(), peft.LoraConfig(r=2, target_modules=["conv1"], use_dora=True))
    routing = split_parameters(net)
    conv = "base_model.model.conv1"
    assert matrices(routing) == {
        f"{conv}.lora_A.default.weight": "flattened to 2 x 27",
        f"{conv}.lora_B.default.weight": "flattened to 8 x 2",
    }
    assert reasons(routing)[f"{conv}.lora_magnitude_vector.default.weight"] == "vector"
    last = peft.get_peft_model(ConvolutionalNet(), peft.LoraConfig(r=2, target_modules=["fc"]))
    assert split_parameters(last).note == ""

    options = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
    moe = build("Qwen3MoeForCausalLM", **options)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    routing = split_parameters(peft.get_peft_model(moe, config))
    assert len(routing) == 4 and matrices(routing) == {}
    assert set(reasons(routing).values()) == {"LoRA factors of 4 experts in one tensor: B interleaves their columns"}

    bert = build("BertForSequenceClassification", **BERT, num_labels=5)
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    said = reasons(split_parameters(peft.get_peft_model(bert, config)))
    assert said["base_model.model.classifier.modules_to_save.default.weight"].startswith("output head: 5 outputs")


def operators(route: Route) -> list[Tensor]:
    """The matrices that a route says a tensor holds: flattened, transposed, split, in that order."""
    weight = route.parameter.detach()
    weight = weight.flatten(1) if route.layout == "flatten" else weight
    weight = weight.mT if route.transposed else weight
    return list(weight.split(route.splits, dim=-2)) if route.splits else [weight]


def route_of(module: nn.Module, name: str = "weight") -> Route:
    return only(split_parameters(module.double()), name)


def test_u7_4_the_matrices_of_a_route_compute_what_its_layer_computes() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64)

    linear = nn.Linear(5, 3, bias=False)
    (matrix,) = operators(route_of(linear))
    assert torch.allclose(linear(x), x @ matrix.T)

    from transformers.pytorch_utils import Conv1D

    reverse = Conv1D(3, 5)
    (matrix,) = operators(route_of(reverse))
    assert matrix.shape == (3, 5)
    assert torch.allclose(reverse(x), x @ matrix.T)

    attention = nn.MultiheadAttention(5, 1, bias=False, batch_first=True)
    query, key, value = operators(route_of(attention, "in_proj_weight"))
    seen = F.scaled_dot_product_attention(x @ query.T, x @ key.T, x @ value.T)
    assert torch.allclose(attention(x[None], x[None], x[None])[0][0], seen @ attention.out_proj.weight.T)

    lstm = nn.LSTM(5, 4, bias=False).double()
    gates = [part @ x[0] for part in operators(route_of(lstm, "weight_ih_l0"))]
    cell = gates[0].sigmoid() * gates[2].tanh()
    assert torch.allclose(lstm(x[:1])[0][0], gates[3].sigmoid() * cell.tanh())


def test_u7_4_the_matrices_of_convolutions_map_patches_to_channels_and_back() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    patches = F.unfold(image, 3)  # [2, 6 * 9, 9]
    plain = nn.Conv2d(6, 4, 3, bias=False)
    (matrix,) = operators(route_of(plain))
    assert torch.allclose(plain(image).flatten(2), matrix @ patches)

    grouped = nn.Conv2d(6, 4, 3, groups=2, bias=False)
    first, second = operators(route_of(grouped))
    expected = torch.cat([first @ patches[:, :27], second @ patches[:, 27:]], dim=1)
    assert torch.allclose(grouped(image).flatten(2), expected)

    back = nn.ConvTranspose2d(6, 4, 3, bias=False)
    (matrix,) = operators(route_of(back))  # a channel vector -> a patch
    assert matrix.shape == (4 * 9, 6)
    assert torch.allclose(back(image), F.fold(matrix @ image.flatten(2), 7, 3))


@pytest.mark.parametrize("architecture", ["gpt_oss", "qwen3_moe"])
def test_u7_4_the_matrices_of_expert_stacks_map_inputs_to_outputs(architecture: str) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    torch.manual_seed(0)
    if architecture == "gpt_oss":
        config = transformers.GptOssConfig(num_local_experts=3, hidden_size=8, intermediate_size=8)
        experts: Any = GptOssExperts(config)
    else:
        config = transformers.Qwen3MoeConfig(num_experts=3, hidden_size=8, moe_intermediate_size=8)
        experts = Qwen3MoeExperts(config)
    config._experts_implementation = "eager"
    for parameter in experts.parameters():
        parameter.data.normal_()
        if parameter.ndim == 2:
            parameter.data.zero_()
    x, chosen = torch.randn(4, 8, dtype=torch.float64), torch.tensor([[0], [2], [1], [2]])
    routing = split_parameters(experts.double())
    (gate_up,), (down,) = (operators(only(routing, name)) for name in ("gate_up_proj", "down_proj"))
    for token, expert in enumerate(chosen.flatten().tolist()):
        hidden = experts._apply_gate((gate_up[expert] @ x[token])[None])[0]
        seen = experts(x, chosen, torch.ones(4, 1, dtype=torch.float64))[token]
        assert torch.allclose(seen, down[expert] @ hidden)


def test_u7_4_patterns_decide_first_and_match_every_name_of_a_shared_tensor() -> None:
    model = SmallGPT(65, 16, 8, tied=True)
    routing = split_parameters(model, matrix="head.weight", auxiliary=["up.*", "down.weight"])
    assert matrices(routing) == {"wte.weight": "matrix"}
    assert reasons(routing)["wte.weight"] == "named by matrix='head.weight'"
    assert reasons(routing)["up.bias"] == "named by auxiliary='up.*'"
    depthwise = nn.Conv1d(4, 4, 3, groups=4)
    assert matrices(split_parameters(depthwise, matrix=["weight"])) == {"weight": "flattened to 4 x 3"}
    gpt2 = build("GPT2LMHeadModel", vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    named = split_parameters(gpt2, matrix=["*.c_attn.weight"])
    assert only(named, "transformer.h.0.attn.c_attn.weight").transposed


def test_u4_5_a_pattern_that_matches_nothing_names_the_nearest() -> None:
    model = SmallGPT(65, 16, 8)
    with pytest.raises(ValueError, match=r"auxiliary='haed\.weight' matches no parameter.*head\.weight"):
        split_parameters(model, auxiliary=["haed.weight"])
    with pytest.raises(ValueError, match=r"matrix='zzz' matches no parameter: the nearest names are wte\.weight"):
        split_parameters(model, matrix="zzz")


def test_u7_4_bad_input_is_refused() -> None:
    model = SmallGPT(65, 16, 8)
    with pytest.raises(ValueError, match=r"up\.weight is named by matrix='up\.\*t' and by auxiliary='u\*'"):
        split_parameters(model, matrix=["up.*t"], auxiliary=["u*"])
    with pytest.raises(ValueError, match=r"up\.bias has shape \[32\].*two dimensions or more"):
        split_parameters(model, matrix=["up.*"])
    with pytest.raises(ValueError, match=r"SmallGPT has no trainable tensor \(7 are frozen\)"):
        split_parameters(model.requires_grad_(False))
    with pytest.raises(ValueError, match=r"weight has no shape yet: run the model once"):
        split_parameters(nn.LazyLinear(3))
    sharded = nn.Linear(3, 2)
    sharded.weight.ds_shape = sharded.weight.shape
    with pytest.raises(ValueError, match=r"weight is flattened for sharding \(FSDP1 or ZeRO-3\)"):
        split_parameters(sharded)
    with pytest.raises(ValueError, match=r"matrix=\{'use_muon': \.\.\.\}: the routing decides this key"):
        split_parameters(nn.Linear(3, 2)).param_groups(matrix={"use_muon": False})


def test_u7_4_frozen_tensors_are_counted_and_left_out() -> None:
    model = SmallGPT(65, 16, 8)
    model.wte.requires_grad_(False)
    model.head.requires_grad_(False)
    routing = split_parameters(model)
    assert routing.frozen == 2
    assert_claimed_once(model, routing)
    assert routing.note == ""
    assert "frozen: 2 tensors, left out" in str(routing).splitlines()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_u7_4_every_trainable_tensor_is_claimed_exactly_once(data: st.DataObject) -> None:
    makers = {
        "linear": lambda: nn.Linear(4, 4),
        "embedding": lambda: nn.Embedding(4, 4),
        "conv": lambda: nn.Conv1d(4, 4, 2, groups=data.draw(st.sampled_from([1, 2, 4]))),
        "up": lambda: nn.ConvTranspose1d(4, 4, 2),
        "norm": lambda: nn.GroupNorm(2, 4),
        "attention": lambda: nn.MultiheadAttention(4, 2),
        "gru": lambda: nn.GRU(4, 4),
    }
    kinds = data.draw(st.lists(st.sampled_from(sorted(makers)), min_size=1, max_size=8))
    model = nn.Sequential(*[nn.Sequential(makers[kind]()) for kind in kinds])
    square = [module for module in model.modules() if isinstance(module, nn.Embedding) or type(module) is nn.Linear]
    for module in square:
        if data.draw(st.booleans()):
            module.weight = square[0].weight
    for parameter in list(model.parameters())[1:]:
        parameter.requires_grad_(data.draw(st.booleans()))
    routing = split_parameters(model)
    assert_claimed_once(model, routing)
    assert routing.frozen == sum(not parameter.requires_grad for parameter in model.parameters())
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for route in routing:
        assert route.rule == "auxiliary" or (route.parameter.ndim > 1 and id(route.parameter) not in tables)
        assert not route.splits or sum(route.splits) == len(route.parameter)
    grouped = [entry for group in routing.param_groups() for entry in group["params"]]
    assert sorted(name for name, _ in grouped) == sorted(route.name for route in routing)


def test_u7_4_groups_for_an_optimizer() -> None:
    model = ConvolutionalNet()
    routing = split_parameters(model, auxiliary=["fc.*"])
    groups = routing.param_groups(matrix={"lr": 0.02}, auxiliary={"lr": 3e-4, "weight_decay": 0.0})
    ways = [(group["use_muon"], group["layout"], group["transposed"], group["splits"]) for group in groups]
    assert ways == [
        (True, "flatten", False, ()),
        (True, "flatten", False, (3, 3, 3, 3)),
        (True, "flatten", True, ()),
        (False, "batch", False, ()),
    ]
    assert [group["lr"] for group in groups] == [0.02] * 3 + [3e-4]
    for group in groups:
        assert group["reasons"] == [reasons(routing)[name] for name, _ in group["params"]]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert optimizer.param_groups[1]["param_names"] == ["grouped.weight"]
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_u7_4_the_table_is_logged_or_shown(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Linear(3, 2)
    with caplog.at_level(logging.INFO, logger="burnish.optim.routing"):
        groups = param_groups(model, auxiliary=["bias"])
    assert [name for name, _ in groups[0]["params"]] == ["weight"]
    assert caplog.messages == [str(split_parameters(model, auxiliary=["bias"]))]
    assert capsys.readouterr() == ("", "")
    param_groups(model, show=True)
    out, err = capsys.readouterr()
    assert out == "" and err == f"{split_parameters(model)}\n"


def test_u7_4_the_table_of_a_deep_model_fits_a_screen() -> None:
    with torch.device("meta"):
        model = build("Qwen3ForCausalLM", **{**DECODER, "num_hidden_layers": 30, "head_dim": 8})
    assert str(split_parameters(model)) == (
        "tensor                                             shape     rule       as      reason\n"
        "model.embed_tokens.weight                          [96, 32]  auxiliary  -       embedding\n"
        "model.layers.0-29.self_attn.q_proj.weight          [32, 32]  matrix     matrix  linear layer\n"
        "model.layers.0-29.self_attn.k_proj.weight          [16, 32]  matrix     matrix  linear layer\n"
        "model.layers.0-29.self_attn.v_proj.weight          [16, 32]  matrix     matrix  linear layer\n"
        "model.layers.0-29.self_attn.o_proj.weight          [32, 32]  matrix     matrix  linear layer\n"
        "model.layers.0-29.self_attn.q_norm.weight          [8]       auxiliary  -       norm (Qwen3RMSNorm)\n"
        "model.layers.0-29.self_attn.k_norm.weight          [8]       auxiliary  -       norm (Qwen3RMSNorm)\n"
        "model.layers.0-29.mlp.gate_proj.weight             [48, 32]  matrix     matrix  linear layer\n"
        "model.layers.0-29.mlp.up_proj.weight               [48, 32]  matrix     matrix  linear layer\n"
        "model.layers.0-29.mlp.down_proj.weight             [32, 48]  matrix     matrix  linear layer\n"
        "model.layers.0-29.input_layernorm.weight           [32]      auxiliary  -       norm (Qwen3RMSNorm)\n"
        "model.layers.0-29.post_attention_layernorm.weight  [32]      auxiliary  -       norm (Qwen3RMSNorm)\n"
        "model.norm.weight                                  [32]      auxiliary  -       norm (Qwen3RMSNorm)\n"
        "lm_head.weight                                     [96, 32]  auxiliary  -       output head:"
        " get_output_embeddings()\n"
        "matrix: 210 tensors, 230,400 parameters (96.4%)\n"
        "auxiliary: 123 tensors, 8,576 parameters (3.6%)"
    )


def test_u7_4_lines_are_shared_by_equal_tensors_only_and_say_which() -> None:
    def route(name: str, width: int = 2, reason: str = "r") -> Route:
        return Route(name, torch.zeros(2, width), "matrix", reason)

    names = [f"m.{layer}.e.{expert}.w" for layer in (0, 1, 2, 5) for expert in (0, 1)]
    rows = str(Routing(tuple(route(name) for name in names))).splitlines()[1:-2]
    assert [row.split()[0] for row in rows] == ["m.0-2,5.e.0-1.w"]
    rows = str(Routing(tuple(route(name) for name in names[:-1]))).splitlines()[1:-2]
    assert [row.split("  ")[0] for row in rows] == ["m.0-2,5.e.0-1.w (7 of these)"]
    unlike = (route("m.0.w"), route("m.1.w", width=3), route("m.2.w", reason="other"), route("m.3.w"))
    rows = str(Routing(unlike)).splitlines()[1:-2]
    assert [row.split()[0] for row in rows] == ["m.0,3.w", "m.1.w", "m.2.w"]


def test_u7_4_plain_tensors_are_routed_by_their_dimensions() -> None:
    shapes = [(), (3,), (3, 4), (2, 3, 4), (5, 4, 3, 2)]
    named = [(f"t{len(shape)}", torch.zeros(shape, requires_grad=True)) for shape in shapes]
    routing = route_tensors([*named, ("frozen", torch.zeros(2, 2))])
    assert matrices(routing) == {"t2": "matrix", "t3": "stack of 2", "t4": "flattened to 5 x 24"}
    assert routing.frozen == 1
    assert reasons(routing)["t1"] == "1 dimension: a vector"
    assert reasons(routing)["t2"] == (
        "2 dimensions: a matrix; without the model, an embedding or a head is not recognised"
    )
    tensors = [tensor for _, tensor in named]
    groups = route_tensors(tensors).param_groups()
    assert [[id(tensor) for tensor in group["params"]] for group in groups] == [
        [id(tensors[2]), id(tensors[3])],
        [id(tensors[4])],
        [id(tensors[0]), id(tensors[1])],
    ]
    with pytest.raises(ValueError, match="b and a are the same tensor"):
        route_tensors([("a", tensors[2]), ("b", tensors[2])])
    assert list(route_tensors([])) == []


def same_routes(wrapped: nn.Module, model: nn.Module) -> None:
    routing, expected = split_parameters(wrapped), split_parameters(model)
    assert reasons(routing) == reasons(expected)
    assert matrices(routing) == matrices(expected)


def test_u7_4_compiled_and_checkpointed_models_keep_their_names() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = build("LlamaForCausalLM", **DECODER, tie_word_embeddings=True)
    same_routes(torch.compile(model), model)
    expected = reasons(split_parameters(model))
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert reasons(split_parameters(model)) == expected
    # A part of the user's own model may be called "module", and keeps its name.
    assert "module.weight" in reasons(split_parameters(nn.ModuleDict({"module": nn.Linear(2, 2)})))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_of_four() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_u7_4_a_data_parallel_model_keeps_its_names() -> None:
    model = build("LlamaForCausalLM", **DECODER, tie_word_embeddings=True)
    same_routes(nn.parallel.DistributedDataParallel(model), model)


@pytest.mark.usefixtures("one_of_four")
def test_u7_4_sharded_models_show_whole_shapes() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    options = {**DECODER, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
    with torch.device("meta"):
        model = build("Qwen3MoeForCausalLM", **options)
    expected = split_parameters(model)
    table = str(expected)
    mesh = torch.distributed.init_device_mesh("cpu", (4,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    routing = split_parameters(model)
    assert str(routing) == table
    weight = only(routing, "model.layers.0.mlp.experts.down_proj").parameter
    assert isinstance(weight, DTensor) and weight.shape == (8, 32, 12) and weight.to_local().shape == (2, 32, 12)


@pytest.mark.usefixtures("one_process")
def test_u7_4_parameters_flattened_by_the_first_fsdp_are_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for original in (False, True):
            model = FullyShardedDataParallel(nn.Linear(4, 3), device_id=torch.device("cpu"), use_orig_params=original)
            with pytest.raises(ValueError, match=r"is flattened for sharding \(FSDP1 or ZeRO-3\)"):
                split_parameters(model)
