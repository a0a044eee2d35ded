"""The public architectures that `models.py` cuts: small, with random weights, nothing downloaded.

Each is a row (family, name, build, inputs): `build()` gives the network, `inputs(batch, seed)` a tree of samples. The
packages are imported where they are needed, so that the list can be read without them.
"""

import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from halfpass.tree import Tree

Inputs = Callable[[int, int], Tree]


@dataclass(frozen=True)
class Architecture:
    """A network as its package makes it."""

    family: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs


# --- Samples ----------------------------------------------------------------------------------------------------------


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(*shape: int) -> Inputs:
    """Normal values of one sample's shape: pictures, volumes, signals, rows."""
    return lambda batch, seed: torch.randn(batch, *shape, generator=drawn(seed))


def positive(*shape: int) -> Inputs:
    return lambda batch, seed: torch.rand(batch, *shape, generator=drawn(seed))


def whole_numbers(high: int, *shape: int) -> Inputs:
    return lambda batch, seed: torch.randint(1, high, (batch, *shape), generator=drawn(seed))


def several(*parts: Inputs) -> Inputs:
    return lambda batch, seed: tuple(part(batch, seed + i) for i, part in enumerate(parts))


def named(**parts: Inputs) -> Inputs:
    return lambda batch, seed: {name: part(batch, seed + i) for i, (name, part) in enumerate(parts.items())}


def padding(length: int) -> Inputs:
    """Ones up to each sample's own length, which is `length` for the first."""

    def mask(batch: int, seed: int) -> Tensor:
        lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=drawn(seed))
        lengths[0] = length
        return (torch.arange(length)[None] < lengths).long()

    return mask


def ones(length: int) -> Inputs:
    return lambda batch, seed: torch.ones(batch, length, dtype=torch.int64)


def text(vocabulary: int = 100, length: int = 12) -> Inputs:
    """Token numbers from 3 (below are the special ones), 1 where the mask says padding."""

    def draw(batch: int, seed: int) -> Tree:
        mask = padding(length)(batch, seed + 1)
        assert isinstance(mask, Tensor)
        tokens = torch.randint(3, vocabulary, (batch, length), generator=drawn(seed))
        return {"input_ids": torch.where(mask == 1, tokens, 1), "attention_mask": mask}

    return draw


def boxes(batch: int, seed: int) -> Tensor:
    """Left, top, right, bottom of 12 words, on a page of 60 by 60."""
    corners = torch.randint(0, 30, (batch, 12, 2), generator=drawn(seed))
    return torch.cat([corners, corners + torch.randint(1, 30, (batch, 12, 2), generator=drawn(seed + 1))], 2)


def together(*trees: Inputs) -> Inputs:
    """One dict of several."""

    def draw(batch: int, seed: int) -> Tree:
        parts: dict[str, Tree] = {}
        for i, tree in enumerate(trees):
            part = tree(batch, seed + 10 * i)
            assert isinstance(part, dict)
            parts |= part
        return parts

    return draw


# --- Packages ---------------------------------------------------------------------------------------------------------


@functools.cache
def library() -> torch.library.Library:
    """Makes wheels that were built for CUDA fit for import: declares the operators that torchvision's describes."""
    schemas = torch.library.Library("torchvision", "DEF")
    boxes = "Tensor dets, Tensor scores, float iou_threshold"
    schemas.define(f"nms({boxes}) -> Tensor")
    schemas.define(f"qnms({boxes}) -> Tensor")
    sizes = "float spatial_scale, int pooled_height, int pooled_width, int sampling_ratio, bool aligned"
    schemas.define(f"roi_align(Tensor input, Tensor rois, {sizes}) -> Tensor")
    found = Path.glob
    with mock.patch.object(Path, "glob", lambda path, name: () if "torchaudio" in name else found(path, name)):
        importlib.import_module("torchaudio")  # works without the compiled part, if it does not see the file
    return schemas


def package(name: str) -> Any:
    """The module of that name."""
    library()
    if name.startswith("deepctr_torch"):  # it asks the internet for its newest version
        sys.modules.setdefault("deepctr_torch.utils", types.SimpleNamespace(check_version=lambda _: None))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def made(module: str, name: str, *arguments: Any, **settings: Any) -> Callable[[], nn.Module]:
    """`module.name(*arguments, **settings)`, when it is called."""

    def build() -> nn.Module:
        network = getattr(package(module), name)(*arguments, **settings)
        assert isinstance(network, nn.Module)
        return network

    return build


def rows(family: str, module: str, table: dict[str, tuple[Inputs, dict[str, Any]]]) -> list[Architecture]:
    return [Architecture(family, n, made(module, n, **settings), inputs) for n, (inputs, settings) in table.items()]


# --- torchvision ------------------------------------------------------------------------------------------------------


def torchvision() -> list[Architecture]:
    small = "alexnet resnet18 resnext50_32x4d densenet121 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5"
    small += " squeezenet1_1 efficientnet_b0 efficientnet_v2_s mnasnet0_5 regnet_x_400mf regnet_y_400mf convnext_tiny"
    small += " swin_t swin_v2_t googlenet"
    table: dict[str, tuple[Inputs, dict[str, Any]]] = {
        n: (floats(3, 64, 64), {"num_classes": 10}) for n in small.split()
    }
    table["googlenet"] = (floats(3, 64, 64), {"num_classes": 10, "aux_logits": False, "init_weights": False})
    table["inception_v3"] = (floats(3, 96, 96), {"num_classes": 10, "aux_logits": False, "init_weights": False})
    table["VisionTransformer"] = (
        floats(3, 64, 64),
        dict(image_size=64, patch_size=16, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10),
    )
    table["MaxVit"] = (
        floats(3, 64, 64),
        dict(
            input_size=(64, 64),
            stem_channels=16,
            partition_size=2,
            block_channels=[16, 32],
            block_layers=[1, 2],
            head_dim=8,
            stochastic_depth_prob=0.1,
            num_classes=10,
        ),
    )
    return rows("torchvision", "torchvision.models", table)


def torchvision_dense() -> list[Architecture]:
    plain: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 5}
    table = {
        "fcn_resnet50": (floats(3, 32, 32), plain),
        "fcn_resnet50_aux": (floats(3, 32, 32), {**plain, "aux_loss": True}),
        "deeplabv3_mobilenet_v3_large": (floats(3, 64, 64), plain),
        "deeplabv3_resnet50": (floats(3, 32, 32), plain),
        "lraspp_mobilenet_v3_large": (floats(3, 64, 64), plain),
    }
    module = "torchvision.models.segmentation"
    return [
        Architecture("torchvision segmentation", name, made(module, name.removesuffix("_aux"), **settings), inputs)
        for name, (inputs, settings) in table.items()
    ]


def torchvision_video() -> list[Architecture]:
    clip = floats(3, 4, 24, 24)
    table: dict[str, tuple[Inputs, dict[str, Any]]] = {
        n: (clip, {"num_classes": 5}) for n in ("r3d_18", "mc3_18", "r2plus1d_18")
    }
    table["SwinTransformer3d"] = (
        floats(3, 8, 32, 32),
        dict(
            patch_size=[2, 4, 4],
            embed_dim=24,
            depths=[2, 2, 2],
            num_heads=[2, 2, 4],
            window_size=[4, 4, 4],
            num_classes=5,
        ),
    )
    return rows("torchvision video", "torchvision.models.video", table)


# --- timm -------------------------------------------------------------------------------------------------------------

TIMM_CONVOLUTIONS = """resnet10t resnet26d resnetv2_50 legacy_seresnet18 skresnet18 ecaresnet26t resnest14d
res2net50_26w_4s dla34 ese_vovnet19b_dw regnetx_002 regnety_002 mobilenetv2_050 mobilenetv3_small_050
mobilenetv4_conv_small efficientnet_b0 tf_efficientnet_lite0 tinynet_e fbnetc_100 mnasnet_small lcnet_035 hardcorenas_a
ghostnet_050 ghostnetv2_100 rexnet_100 hrnet_w18_small convnext_atto convnextv2_atto nf_regnet_b0 cspresnet50
cspdarknet53 selecsls42b gernet_s repvgg_a0 mobileone_s0 xception41 inception_next_atto repvit_m0_9 repghostnet_050
starnet_s1 hgnetv2_b0 mambaout_femto rdnet_tiny convformer_s18 densenet121 semnasnet_075"""

TIMM_ATTENTION: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 4},
    "vit_small_patch32_224": {"img_size": 64, "depth": 4, "embed_dim": 96, "num_heads": 3},
    "vit_relpos_small_patch16_224": {"img_size": 64, "depth": 3},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 4},
    "deit3_small_patch16_224": {"img_size": 64, "depth": 3},
    "beit_base_patch16_224": {"img_size": 64, "depth": 4, "embed_dim": 48, "num_heads": 3},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 4},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4},
    "swinv2_cr_tiny_ns_224": {"img_size": 64},
    "mixer_s32_224": {"img_size": 64},
    "gmlp_ti16_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "convmixer_768_32": {},
    "pit_ti_224": {"img_size": 64},
    "cait_xxs24_224": {"img_size": 64, "depth": 4},
    "xcit_nano_12_p16_224": {"img_size": 64},
    "coat_lite_tiny": {"img_size": 64},
    "coatnet_nano_rw_224": {"img_size": 64},
    "crossvit_tiny_240": {"img_size": 240},
    "visformer_tiny": {"img_size": 64},
    "twins_pcpvt_small": {"img_size": 64},
    "twins_svt_small": {"img_size": 64},
    "pvt_v2_b0": {},
    "poolformer_s12": {},
    "edgenext_xx_small": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "efficientvit_b0": {},
    "efficientvit_m0": {"img_size": 64},
    "fastvit_t8": {},
    "focalnet_tiny_srf": {},
    "davit_tiny": {},
    "gcvit_xxtiny": {"img_size": 64},
    "tiny_vit_5m_224": {},
    "sequencer2d_s": {"img_size": 64},
    "volo_d1_224": {"img_size": 64},
    "caformer_s18": {},
    "nest_tiny": {"img_size": 64},
    "shvit_s1": {},
    "swiftformer_xs": {},
    "mvitv2_tiny": {"img_size": 64},
    "hiera_tiny_224": {"img_size": 64},
}


def timm_networks(family: str, table: dict[str, dict[str, Any]]) -> list[Architecture]:
    return [
        Architecture(
            family,
            name,
            made("timm", "create_model", name, pretrained=False, num_classes=10, **settings),
            floats(3, settings.get("img_size", 64), settings.get("img_size", 64)),
        )
        for name, settings in table.items()
    ]


def timm_convolutions() -> list[Architecture]:
    return timm_networks("timm convolutions", {name: {} for name in TIMM_CONVOLUTIONS.split()})


def timm_attention() -> list[Architecture]:
    return timm_networks("timm attention", TIMM_ATTENTION)


# --- transformers -----------------------------------------------------------------------------------------------------


def transformer(family: str, model: str, config: str, inputs: Inputs, **settings: Any) -> Architecture:
    """A model class of transformers with a small configuration."""

    def build() -> nn.Module:
        transformers = package("transformers")
        network = getattr(transformers, model.partition("_")[0])(getattr(transformers, config)(**settings))
        assert isinstance(network, nn.Module)
        return network

    return Architecture(family, model, build, inputs)


TOKENS: dict[str, Any] = dict(vocab_size=100, pad_token_id=1, bos_token_id=0, eos_token_id=2)
BERT_SIZE: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
)
BERT: dict[str, Any] = TOKENS | BERT_SIZE
LABELS: dict[str, Any] = dict(num_labels=4)


def text_encoders() -> list[Architecture]:
    family = "transformers text encoders"

    def plain(
        name: str, kind: str = "ForSequenceClassification", inputs: Inputs | None = None, **settings: Any
    ) -> Architecture:
        own = {**BERT, **LABELS, **settings}
        own = {key: value for key, value in own.items() if value is not None}
        return transformer(family, name + kind, f"{name}Config", inputs or text(), **own)

    return [
        plain("Bert"),
        plain("Bert", "ForTokenClassification"),
        plain("Bert", "Model"),
        plain("Roberta"),
        plain("RobertaPreLayerNorm"),
        plain("Camembert"),
        plain("XLMRoberta"),
        plain("XLMRobertaXL"),
        plain("DistilBert", dim=32, hidden_dim=64, n_layers=4, n_heads=2),
        plain("Albert", embedding_size=16),
        plain("Electra", embedding_size=32),
        plain("Deberta"),
        plain("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
        plain("ConvBert", embedding_size=32, conv_kernel_size=3),
        plain("Data2VecText"),
        plain("Ernie"),
        plain("Esm", token_dropout=False, mask_token_id=3, position_embedding_type="rotary"),
        plain("FNet", inputs=named(input_ids=whole_numbers(100, 12)), use_tpu_fourier_optimizations=False),
        plain("Funnel", num_hidden_layers=None, block_sizes=[2, 2], d_model=32, n_head=2, d_head=16, d_inner=64),
        plain("IBert"),
        plain("LayoutLM"),
        plain(
            "Lilt",
            hidden_size=48,
            inputs=together(text(), named(bbox=boxes)),
            max_2d_position_embeddings=64,
            channel_shrink_ratio=2,
        ),
        plain("Longformer", attention_window=4, max_position_embeddings=70),
        plain("BigBird", attention_type="original_full"),
        plain("MegatronBert"),
        plain(
            "MobileBert", embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16, num_feedforward_networks=2
        ),
        plain("ModernBert", global_attn_every_n_layers=2, local_attention=8),
        plain("MPNet"),
        plain("Nystromformer", num_landmarks=12, segment_means_seq_len=12),
        plain("RemBert", input_embedding_size=16, output_embedding_size=16),
        plain("RoFormer", embedding_size=32),
        plain(
            "SqueezeBert", embedding_size=32, q_groups=2, k_groups=2, v_groups=2, intermediate_groups=2, output_groups=2
        ),
        plain("XLM", emb_dim=32, n_layers=3, n_heads=2, n_words=100),
        plain("XLNet", max_position_embeddings=None, d_model=32, n_layer=3, n_head=2, d_inner=64, use_mems_train=False),
        plain("Splinter", "Model"),
        plain("Nomic" + "Bert", "Model"),
        plain("Xmod", "ForSequenceClassification", languages=["en_XX"], default_language="en_XX"),
        plain("EuroBert", "ForSequenceClassification", num_key_value_heads=2),
    ]


def adapters() -> list[Architecture]:
    """Networks of transformers whose weights are frozen, with peft's small trained matrices beside them."""
    family = "peft adapters"

    def adapted(base: Architecture, name: str, kind: str, **settings: Any) -> Architecture:
        def build() -> nn.Module:
            peft = package("peft")
            network = peft.get_peft_model(base.build(), getattr(peft, kind)(**settings))
            assert isinstance(network, nn.Module)
            return network

        return Architecture(family, name, build, base.inputs)

    bert = transformer("", "BertForSequenceClassification", "BertConfig", text(), **BERT, **LABELS)
    vit = transformer(
        "", "ViTForImageClassification", "ViTConfig", floats(3, 32, 32), **BERT_SIZE, **LABELS, image_size=32,
        patch_size=8,
    )  # fmt: skip
    text_parts, picture_parts = ({"target_modules": names} for names in (["query", "value"], ["q_proj", "v_proj"]))
    scaled = dict(target_modules=["key", "value"], feedforward_modules=[])
    return [
        adapted(bert, "LoRA-Bert", "LoraConfig", task_type="SEQ_CLS", r=4, **text_parts),
        adapted(vit, "LoRA-ViT", "LoraConfig", r=4, lora_dropout=0.1, modules_to_save=["classifier"], **picture_parts),
        adapted(vit, "DoRA-ViT", "LoraConfig", r=4, use_dora=True, **picture_parts),
        adapted(bert, "IA3-Bert", "IA3Config", task_type="SEQ_CLS", **scaled),
    ]


def text_decoders() -> list[Architecture]:
    family = "transformers text decoders"
    untied: dict[str, Any] = {"tie_word_embeddings": False, "use_cache": False}

    def plain(name: str, kind: str = "ForCausalLM", **settings: Any) -> Architecture:
        every = BERT | untied | {"num_key_value_heads": 1, "head_dim": 16}
        return transformer(family, name + kind, f"{name}Config", text(), **{**every, **settings})

    gpt2: dict[str, Any] = dict(n_positions=64, n_embd=32, n_layer=4, n_head=2)
    return [
        transformer(family, "GPT2LMHeadModel", "GPT2Config", text(), **TOKENS, **untied, **gpt2),
        transformer(family, "GPT2ForSequenceClassification", "GPT2Config", text(), **TOKENS, **untied, **gpt2),
        transformer(family, "GPTBigCodeForCausalLM", "GPTBigCodeConfig", text(), **TOKENS, **untied, **gpt2),
        transformer(
            family,
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            text(),
            **TOKENS,
            **untied,
            hidden_size=32,
            num_layers=4,
            num_heads=2,
            attention_types=[[["global", "local"], 2]],
            window_size=4,
            max_position_embeddings=64,
        ),
        transformer(family, "GPTJForCausalLM", "GPTJConfig", text(), **TOKENS, **untied, **gpt2, rotary_dim=8),
        transformer(
            family,
            "CodeGenForCausalLM",
            "CodeGenConfig",
            text(),
            **TOKENS,
            **untied,
            **{**gpt2, "n_head": 4},
            rotary_dim=8,
            n_ctx=64,
        ),
        plain("GPTNeoX"),
        plain("OPT", ffn_dim=64, word_embed_proj_dim=32),
        plain("Llama"),
        plain("Llama", "ForSequenceClassification", num_labels=4),
        plain("Mistral", sliding_window=4),
        plain("Qwen2"),
        plain("Qwen3"),
        plain("Gemma"),
        plain("Gemma2", sliding_window=4),
        transformer(
            family,
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            text(),
            **{**BERT, **untied, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4},
        ),
        transformer(
            family,
            "FalconForCausalLM",
            "FalconConfig",
            text(),
            **TOKENS,
            **untied,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
        ),
        transformer(
            family, "BloomForCausalLM", "BloomConfig", text(), **TOKENS, **untied, hidden_size=32, n_layer=4, n_head=2
        ),
        transformer(
            family,
            "MptForCausalLM",
            "MptConfig",
            text(),
            **TOKENS,
            **untied,
            d_model=32,
            n_heads=2,
            n_layers=4,
            max_seq_len=64,
        ),
        plain("Phi"),
        plain("Phi3"),
        plain("StableLm"),
        plain("Starcoder2"),
        plain("Olmo"),
        plain("Olmo2"),
        plain("Cohere"),
        plain("Granite"),
        plain("Glm"),
        plain("SmolLM3"),
        plain("Persimmon"),
        plain("BioGpt"),
        plain("XGLM", d_model=32, ffn_dim=64, num_layers=4, attention_heads=2),
        plain("Mixtral", num_local_experts=2, num_experts_per_tok=1),
        plain(
            "Qwen2Moe",
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
        transformer(
            family,
            "CTRLLMHeadModel",
            "CTRLConfig",
            text(),
            **TOKENS,
            **untied,
            n_positions=64,
            n_embd=32,
            dff=64,
            n_layer=4,
            n_head=2,
        ),
        transformer(
            family, "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", text(), **TOKENS, tie_word_embeddings=False, **gpt2
        ),
        transformer(
            family,
            "MambaForCausalLM",
            "MambaConfig",
            text(),
            **TOKENS,
            **untied,
            hidden_size=32,
            num_hidden_layers=3,
            state_size=4,
        ),
    ]


def sequence_to_sequence() -> list[Architecture]:
    family = "transformers encoder-decoders"
    both = together(text(), named(decoder_input_ids=whole_numbers(100, 8)))
    untied: dict[str, Any] = {"tie_word_embeddings": False, "use_cache": False}
    t5: dict[str, Any] = dict(
        **TOKENS, **untied, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=1
    )
    bart: dict[str, Any] = dict(
        **TOKENS,
        **untied,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        decoder_start_token_id=0,
    )
    return [
        transformer(family, "T5Model", "T5Config", both, **t5),
        transformer(family, "T5EncoderModel", "T5Config", text(), **{**t5, "num_layers": 4}),
        transformer(family, "UMT5EncoderModel", "UMT5Config", text(), **{**t5, "num_layers": 4}),
        transformer(family, "MT5EncoderModel", "MT5Config", text(), **{**t5, "num_layers": 4}),
        transformer(family, "LongT5EncoderModel", "LongT5Config", text(), **{**t5, "num_layers": 4}, local_radius=4),
        transformer(family, "BartModel", "BartConfig", both, **bart),
        transformer(family, "MBartModel", "MBartConfig", both, **bart),
        transformer(family, "PegasusModel", "PegasusConfig", both, **bart),
        transformer(family, "MarianModel", "MarianConfig", both, **bart),
        transformer(family, "BlenderbotSmallModel", "BlenderbotSmallConfig", both, **bart),
        transformer(family, "M2M100Model", "M2M100Config", both, **bart, encoder_layerdrop=0.0, decoder_layerdrop=0.0),
        transformer(
            family,
            "LEDModel",
            "LEDConfig",
            both,
            **{k: v for k, v in bart.items() if k != "max_position_embeddings"},
            attention_window=4,
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
        ),
        transformer(
            family,
            "ProphetNetEncoder",
            "ProphetNetConfig",
            text(),
            **TOKENS,
            hidden_size=32,
            num_encoder_layers=3,
            num_encoder_attention_heads=2,
            encoder_ffn_dim=64,
            num_decoder_layers=2,
            num_decoder_attention_heads=2,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
        ),
    ]


def vision_transformers() -> list[Architecture]:
    family = "transformers vision"
    picture = named(pixel_values=floats(3, 64, 64))
    vit: dict[str, Any] = dict(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        patch_size=16,
        num_labels=5,
    )
    classify = "ForImageClassification"

    def plain(name: str, kind: str = classify, **settings: Any) -> Architecture:
        return transformer(family, name + kind, f"{name}Config", picture, **settings)

    stages: dict[str, Any] = dict(num_labels=5, hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 2, 1])
    return [
        plain("ViT", **vit),
        plain("ViTMSN", **vit),
        plain("DeiT", **vit),
        plain("DeiT", "ForImageClassificationWithTeacher", **vit),
        plain("Beit", **vit, use_relative_position_bias=True),
        plain("Data2VecVision", **vit),
        plain("Dinov2", **vit),
        plain("Dinov2WithRegisters", **vit),
        plain("DINOv3ViT", "Model", **vit),
        plain("IJepa", **vit),
        plain("Yolos", "Model", **{**vit, "image_size": [64, 64]}),
        plain(
            "Hiera",
            embed_dim=16,
            image_size=[64, 64],
            patch_kernel=[7, 7],
            num_labels=5,
            depths=[1, 1, 2, 1],
            num_heads=[1, 2, 2, 4],
            embed_dim_multiplier=2.0,
        ),
        plain(
            "Swin",
            image_size=64,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2, 2],
            num_heads=[1, 2, 2],
            window_size=4,
            num_labels=5,
        ),
        plain(
            "Swinv2",
            image_size=64,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2, 2],
            num_heads=[1, 2, 2],
            window_size=4,
            num_labels=5,
        ),
        plain("ConvNext", **stages),
        plain("ConvNextV2", **stages),
        plain("ResNet", num_labels=5, embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 2, 2], layer_type="basic"),
        plain(
            "RegNet", num_labels=5, embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 2, 1], groups_width=4
        ),
        plain("Bit", num_labels=5, embedding_size=8, hidden_sizes=[16, 32, 64], depths=[1, 2, 2], num_groups=4),
        plain("MobileNetV1", num_labels=5, depth_multiplier=0.25),
        plain("MobileNetV2", num_labels=5, depth_multiplier=0.35),
        plain("MobileViT", num_labels=5, image_size=64),
        plain("MobileViTV2", num_labels=5, image_size=64),
        plain(
            "EfficientNet", num_labels=5, width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320, image_size=64
        ),
        plain(
            "Segformer",
            num_labels=5,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 2, 1],
            num_attention_heads=[1, 2, 2, 4],
        ),
        plain(
            "Segformer",
            "ForSemanticSegmentation",
            num_labels=5,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 2, 1],
            num_attention_heads=[1, 2, 2, 4],
            decoder_hidden_size=16,
        ),
        plain(
            "DPT",
            "ForSemanticSegmentation",
            **{**vit, "num_labels": 5},
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
        ),
        plain(
            "DPT",
            "ForDepthEstimation",
            **vit,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
        ),
        plain("Cvt", num_labels=5, embed_dim=[8, 16, 32], num_heads=[1, 2, 2], depth=[1, 2, 3]),
        plain(
            "Levit",
            num_labels=5,
            image_size=64,
            hidden_sizes=[16, 32, 48],
            num_attention_heads=[1, 2, 3],
            depths=[2, 2, 2],
            key_dim=[8, 8, 8],
        ),
        plain(
            "Pvt",
            num_labels=5,
            image_size=64,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 2, 1],
            num_attention_heads=[1, 2, 2, 4],
        ),
        plain(
            "PvtV2",
            num_labels=5,
            image_size=64,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 2, 1],
            num_attention_heads=[1, 2, 2, 4],
        ),
        plain("PoolFormer", num_labels=5, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
        plain(
            "FocalNet",
            num_labels=5,
            image_size=64,
            embed_dim=16,
            depths=[1, 2, 2],
            focal_levels=[2, 2, 2],
            focal_windows=[3, 3, 3],
            hidden_sizes=[16, 32, 64],
        ),
        plain("SwiftFormer", num_labels=5, image_size=64, depths=[1, 1, 2, 1], embed_dims=[8, 16, 24, 32]),
        plain(
            "HGNetV2",
            num_labels=5,
            embedding_size=8,
            depths=[1, 1, 1, 1],
            hidden_sizes=[16, 16, 16, 32],
            stem_channels=[3, 8, 8],
            stage_in_channels=[8, 16, 16, 16],
            stage_mid_channels=[8, 8, 8, 8],
            stage_out_channels=[16, 16, 16, 32],
            stage_num_blocks=[1, 1, 1, 1],
        ),
        transformer(
            family,
            "VivitForVideoClassification",
            "VivitConfig",
            named(pixel_values=floats(4, 3, 32, 32)),
            **{**vit, "image_size": 32},
            num_frames=4,
            tubelet_size=[2, 8, 8],
        ),
        transformer(
            family,
            "TimesformerForVideoClassification",
            "TimesformerConfig",
            named(pixel_values=floats(4, 3, 32, 32)),
            **{**vit, "image_size": 32, "patch_size": 8},
            num_frames=4,
        ),
        transformer(
            family,
            "VideoMAEForVideoClassification",
            "VideoMAEConfig",
            named(pixel_values=floats(4, 3, 32, 32)),
            **{**vit, "image_size": 32, "patch_size": 8},
            num_frames=4,
        ),
    ]


def audio() -> list[Architecture]:
    family = "transformers audio"
    wave = named(input_values=floats(1600))
    size: dict[str, Any] = dict(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=4,
        classifier_proj_size=16,
    )
    convolutions: dict[str, Any] = dict(
        conv_dim=[16, 16, 16],
        conv_kernel=[10, 3, 3],
        conv_stride=[5, 2, 2],
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        mask_time_length=2,
        layerdrop=0.0,
        apply_spec_augment=False,
    )
    speech = size | convolutions
    spectrum = named(input_features=floats(80, 64))
    classify = "ForSequenceClassification"
    return [
        *[
            transformer(family, n + classify, f"{n}Config", wave, **speech)
            for n in ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat", "Data2VecAudio", "Wav2Vec2Conformer")
        ],
        transformer(
            family,
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            together(wave, named(attention_mask=ones(1600))),
            **speech,
            vocab_size=30,
        ),
        transformer(
            family,
            "Wav2Vec2Model_masking",
            "Wav2Vec2Config",
            wave,
            **{**speech, "apply_spec_augment": True, "mask_time_prob": 0.1},
        ),
        transformer(family, "SEWForSequenceClassification", "SEWConfig", wave, **speech, squeeze_factor=2),
        transformer(
            family, "SEWDForSequenceClassification", "SEWDConfig", wave, **speech, squeeze_factor=2, position_buckets=8
        ),
        transformer(
            family,
            "ASTForAudioClassification",
            "ASTConfig",
            named(input_values=floats(64, 32)),
            **{**size, "max_length": 64, "num_mel_bins": 32},
        ),
        transformer(
            family,
            "WhisperForAudioClassification",
            "WhisperConfig",
            spectrum,
            d_model=32,
            encoder_layers=4,
            encoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_layers=2,
            decoder_attention_heads=2,
            decoder_ffn_dim=64,
            max_source_positions=32,
            num_labels=4,
            vocab_size=100,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        transformer(
            family,
            "Wav2Vec2BertForSequenceClassification",
            "Wav2Vec2BertConfig",
            named(input_features=floats(30, 16)),
            **size,
            feature_projection_input_dim=16,
            conv_depthwise_kernel_size=3,
            apply_spec_augment=False,
            layerdrop=0.0,
        ),
        transformer(
            family,
            "Speech2TextModel",
            "Speech2TextConfig",
            together(named(input_features=floats(32, 16), decoder_input_ids=whole_numbers(90, 6))),
            **TOKENS,
            d_model=32,
            encoder_layers=3,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            input_feat_per_channel=16,
            conv_channels=32,
            max_source_positions=64,
            max_target_positions=32,
            use_cache=False,
        ),
        transformer(
            family,
            "ClapAudioModel",
            "ClapAudioConfig",
            named(input_features=floats(1, 128, 32)),
            spec_size=64,
            num_mel_bins=32,
            patch_size=4,
            patch_stride=[4, 4],
            window_size=4,
            patch_embeds_hidden_size=16,
            depths=[2, 2],
            num_attention_heads=[2, 2],
            hidden_size=32,
            num_classes=4,
            enable_fusion=False,
        ),
    ]


def several_inputs() -> list[Architecture]:
    family = "transformers several inputs"
    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    picture = named(pixel_values=floats(3, 32, 32))
    words: dict[str, Any] = TOKENS | sizes | {"max_position_embeddings": 32, "projection_dim": 16}
    sight = sizes | {"image_size": 32, "patch_size": 8, "projection_dim": 16}
    return [
        transformer(
            family,
            "CLIPModel",
            "CLIPConfig",
            together(text(), picture),
            text_config=words,
            vision_config=sight,
            projection_dim=16,
        ),
        transformer(family, "CLIPVisionModel", "CLIPVisionConfig", picture, **sight),
        transformer(
            family,
            "SiglipModel",
            "SiglipConfig",
            together(text(), picture),
            text_config=words | {"projection_size": 32},
            vision_config=sight,
        ),
        transformer(family, "SiglipVisionModel", "SiglipVisionConfig", picture, **sight),
        transformer(
            family,
            "AltCLIPModel",
            "AltCLIPConfig",
            together(text(), picture),
            text_config=words | {"project_dim": 32},
            vision_config=sight,
            projection_dim=16,
        ),
        transformer(
            family,
            "BlipForImageTextRetrieval",
            "BlipConfig",
            together(text(), picture),
            text_config=words | {"encoder_hidden_size": 32},
            vision_config=sight,
            image_text_hidden_size=16,
        ),
        transformer(family, "ViltModel", "ViltConfig", together(text(), picture), **BERT, image_size=32, patch_size=8),
        transformer(
            family,
            "VisualBertModel",
            "VisualBertConfig",
            together(text(), named(visual_embeds=floats(4, 16), visual_attention_mask=ones(4))),
            **BERT,
            visual_embedding_dim=16,
        ),
        transformer(
            family,
            "LxmertModel",
            "LxmertConfig",
            together(text(), named(visual_feats=floats(4, 16), visual_pos=positive(4, 4))),
            **TOKENS,
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=64,
            l_layers=2,
            x_layers=2,
            r_layers=2,
            visual_feat_dim=16,
            max_position_embeddings=64,
        ),
        transformer(
            family,
            "BridgeTowerModel",
            "BridgeTowerConfig",
            together(text(), picture),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            text_config=TOKENS | sizes | {"num_hidden_layers": 3, "max_position_embeddings": 64},
            vision_config=sizes | {"hidden_size": 64, "image_size": 32, "patch_size": 8},
        ),
        transformer(
            family,
            "GroupViTVisionModel",
            "GroupViTVisionConfig",
            picture,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            depths=[2, 2, 2],
            num_group_tokens=[8, 4, 0],
            num_output_groups=[8, 4, 0],
        ),
        transformer(
            family,
            "LayoutLMForTokenClassification",
            "LayoutLMConfig",
            together(text(), named(bbox=boxes)),
            **BERT,
            max_2d_position_embeddings=64,
            num_labels=4,
        ),
        transformer(
            family,
            "LayoutLMv3ForTokenClassification",
            "LayoutLMv3Config",
            together(text(), named(bbox=boxes), picture),
            **BERT,
            max_2d_position_embeddings=64,
            coordinate_size=6,
            shape_size=4,
            input_size=32,
            patch_size=8,
            num_labels=4,
        ),
        transformer(
            family,
            "PatchTSTForClassification",
            "PatchTSTConfig",
            named(past_values=floats(32, 3)),
            num_input_channels=3,
            context_length=32,
            patch_length=4,
            patch_stride=4,
            d_model=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            ffn_dim=32,
            num_targets=4,
            use_cls_token=True,
        ),
        transformer(
            family,
            "PatchTSMixerForPrediction",
            "PatchTSMixerConfig",
            named(past_values=floats(32, 3)),
            num_input_channels=3,
            context_length=32,
            prediction_length=8,
            patch_length=4,
            patch_stride=4,
            d_model=16,
            num_layers=3,
            loss="mse",
        ),
        transformer(
            family,
            "InformerModel",
            "InformerConfig",
            named(
                past_values=floats(24),
                past_time_features=floats(24, 2),
                past_observed_mask=ones(24),
                future_values=floats(6),
                future_time_features=floats(6, 2),
            ),
            prediction_length=6,
            context_length=16,
            lags_sequence=[1, 2, 8],
            num_time_features=2,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            use_cache=False,
        ),
        transformer(
            family,
            "TimeSeriesTransformerModel",
            "TimeSeriesTransformerConfig",
            named(
                past_values=floats(24),
                past_time_features=floats(24, 2),
                past_observed_mask=ones(24),
                future_values=floats(6),
                future_time_features=floats(6, 2),
            ),
            prediction_length=6,
            context_length=16,
            lags_sequence=[1, 2, 8],
            num_time_features=2,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            use_cache=False,
        ),
        transformer(
            family,
            "DecisionTransformerModel",
            "DecisionTransformerConfig",
            named(
                states=floats(5, 6),
                actions=floats(5, 3),
                rewards=floats(5, 1),
                returns_to_go=floats(5, 1),
                timesteps=whole_numbers(20, 5),
                attention_mask=padding(5),
            ),
            state_dim=6,
            act_dim=3,
            hidden_size=32,
            max_ep_len=32,
            n_layer=3,
            n_head=2,
            n_positions=64,
            vocab_size=1,
        ),
    ]


# --- Medical pictures -------------------------------------------------------------------------------------------------


def monai() -> list[Architecture]:
    plane, volume = {"spatial_dims": 2}, {"spatial_dims": 3}
    in_out: dict[str, Any] = {"in_channels": 1, "out_channels": 3}
    picture, solid = floats(1, 32, 32), floats(1, 32, 32, 32)
    five: dict[str, Any] = dict(channels=(8, 16, 32, 32), strides=(2, 2, 2))
    table: dict[str, tuple[Inputs, dict[str, Any]]] = {
        "UNet": (solid, volume | in_out | five | {"num_res_units": 2}),
        "AttentionUnet": (picture, plane | in_out | five),
        "BasicUNet": (picture, plane | in_out | {"features": (8, 8, 16, 16, 32, 8)}),
        "BasicUNetPlusPlus": (picture, plane | in_out | {"features": (8, 8, 16, 16, 32, 8)}),
        "FlexibleUNet": (picture, plane | in_out | {"backbone": "efficientnet-b0"}),
        "DynUNet": (
            picture,
            plane
            | in_out
            | dict(
                kernel_size=[3, 3, 3],
                strides=[1, 2, 2],
                upsample_kernel_size=[2, 2],
                filters=[8, 16, 32],
                deep_supervision=True,
            ),
        ),
        "SegResNet": (picture, plane | in_out | {"init_filters": 8}),
        "SegResNetVAE": (picture, plane | in_out | {"init_filters": 8, "input_image_size": (32, 32)}),
        "SegResNetDS": (picture, plane | in_out | {"init_filters": 8, "blocks_down": (1, 2, 2), "dsdepth": 2}),
        "UNETR": (picture, plane | in_out | dict(img_size=32, feature_size=8, hidden_size=48, mlp_dim=64, num_heads=4)),
        "SwinUNETR": (
            floats(1, 64, 64),
            plane | in_out | dict(feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_size=4),
        ),
        "ViT": (
            picture,
            dict(
                in_channels=1,
                img_size=32,
                patch_size=8,
                hidden_size=32,
                mlp_dim=64,
                num_layers=4,
                num_heads=2,
                classification=True,
                num_classes=4,
                spatial_dims=2,
            ),
        ),
        "ViTAutoEnc": (
            picture,
            dict(
                in_channels=1,
                img_size=32,
                patch_size=4,
                hidden_size=32,
                mlp_dim=64,
                num_layers=4,
                num_heads=2,
                spatial_dims=2,
            ),
        ),
        "MaskedAutoEncoderViT": (
            picture,
            dict(
                in_channels=1,
                img_size=32,
                patch_size=8,
                hidden_size=32,
                mlp_dim=64,
                num_layers=3,
                num_heads=2,
                spatial_dims=2,
                decoder_hidden_size=32,
                decoder_mlp_dim=64,
                decoder_num_layers=2,
                decoder_num_heads=2,
            ),
        ),
        "VNet": (floats(1, 32, 32), plane | in_out | {"dropout_prob_down": 0.1, "dropout_prob_up": (0.1, 0.1)}),
        "HighResNet": (picture, plane | in_out),
        "DenseNet121": (floats(1, 48, 48), plane | in_out),
        "ResNet": (
            solid,
            dict(
                block="basic",
                layers=[1, 1, 1, 1],
                block_inplanes=[8, 16, 24, 32],
                spatial_dims=3,
                n_input_channels=1,
                num_classes=3,
            ),
        ),
        "SEResNet50": (floats(1, 32, 32), dict(spatial_dims=2, in_channels=1, num_classes=3)),
        "EfficientNetBN": (
            picture,
            plane | dict(model_name="efficientnet-b0", pretrained=False, in_channels=1, num_classes=3),
        ),
        "AutoEncoder": (picture, plane | in_out | {"channels": (8, 16, 32), "strides": (2, 2, 2)}),
        "VarAutoEncoder": (
            picture,
            dict(spatial_dims=2, in_shape=(1, 32, 32), out_channels=1, latent_size=8, channels=(8, 16), strides=(2, 2)),
        ),
        "Regressor": (picture, dict(in_shape=(1, 32, 32), out_shape=(2,), channels=(8, 16, 32), strides=(2, 2, 2))),
        "Discriminator": (picture, dict(in_shape=(1, 32, 32), channels=(8, 16, 32), strides=(2, 2, 2))),
        "MILModel": (floats(2, 3, 32, 32), dict(num_classes=3, mil_mode="att", pretrained=False)),
        "MedNeXt": (
            picture,
            plane
            | in_out
            | dict(
                init_filters=8,
                encoder_expansion_ratio=2,
                decoder_expansion_ratio=2,
                blocks_down=(1, 1, 1),
                blocks_bottleneck=1,
                blocks_up=(1, 1, 1),
            ),
        ),
        "RegUNet": (picture, dict(spatial_dims=2, in_channels=1, num_channel_initial=8, depth=2)),
        "DiffusionModelUNet": (
            several(picture, whole_numbers(50)),
            plane
            | dict(
                in_channels=1,
                out_channels=1,
                channels=(8, 16, 16),
                attention_levels=(False, False, True),
                num_res_blocks=1,
                num_head_channels=8,
                norm_num_groups=4,
            ),
        ),
        "AutoencoderKL": (
            picture,
            plane
            | dict(
                in_channels=1,
                out_channels=1,
                channels=(8, 8, 16),
                num_res_blocks=(1, 1, 1),
                attention_levels=(False, False, False),
                latent_channels=3,
                norm_num_groups=4,
            ),
        ),
        "VQVAE": (
            picture,
            plane
            | dict(
                in_channels=1,
                out_channels=1,
                channels=(8, 16),
                num_res_channels=(8, 16),
                num_res_layers=1,
                downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)),
                upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
                num_embeddings=16,
                embedding_dim=8,
            ),
        ),
    }
    return rows("MONAI", "monai.networks.nets", table)


def segmentation_models() -> list[Architecture]:
    table: dict[str, tuple[str, str]] = {
        "Unet_resnet18": ("Unet", "resnet18"),
        "Unet_efficientnet-b0": ("Unet", "efficientnet-b0"),
        "Unet_mobilenet_v2": ("Unet", "mobilenet_v2"),
        "Unet_mit_b0": ("Unet", "mit_b0"),
        "Unet_timm-regnetx_002": ("Unet", "timm-regnetx_002"),
        "UnetPlusPlus_resnet18": ("UnetPlusPlus", "resnet18"),
        "MAnet_resnet18": ("MAnet", "resnet18"),
        "Linknet_resnet18": ("Linknet", "resnet18"),
        "FPN_resnet18": ("FPN", "resnet18"),
        "FPN_densenet121": ("FPN", "densenet121"),
        "PSPNet_resnet18": ("PSPNet", "resnet18"),
        "PAN_resnet18": ("PAN", "resnet18"),
        "DeepLabV3_resnet18": ("DeepLabV3", "resnet18"),
        "DeepLabV3Plus_resnet18": ("DeepLabV3Plus", "resnet18"),
        "UPerNet_resnet18": ("UPerNet", "resnet18"),
        "Segformer_mit_b0": ("Segformer", "mit_b0"),
    }
    return [
        Architecture(
            "segmentation_models_pytorch",
            name,
            made("segmentation_models_pytorch", decoder, encoder_name=encoder, encoder_weights=None, classes=4),
            floats(3, 128, 128) if decoder == "PAN" else floats(3, 64, 64),
        )
        for name, (decoder, encoder) in table.items()
    ]


def nnunet() -> list[Architecture]:
    family, module = "nnU-Net", "dynamic_network_architectures.architectures."

    def plain(name: str, file: str, dimensions: int, inputs: Inputs, **settings: Any) -> Architecture:
        def build() -> nn.Module:
            convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
            norm = nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d
            common: dict[str, Any] = dict(
                input_channels=1,
                n_stages=4,
                features_per_stage=[8, 16, 24, 32],
                conv_op=convolution,
                kernel_sizes=3,
                strides=[1, 2, 2, 2],
                num_classes=3,
                conv_bias=True,
                norm_op=norm,
                norm_op_kwargs={"affine": True},
                nonlin=nn.LeakyReLU,
                nonlin_kwargs={"inplace": True},
            )
            return made(module + file, name, **common, **settings)()

        return Architecture(family, f"{name}_{dimensions}d_{len(settings)}", build, inputs)

    picture, solid = floats(1, 32, 32), floats(1, 16, 16, 16)
    one: dict[str, Any] = dict(n_conv_per_stage=2, n_conv_per_stage_decoder=2)
    residual: dict[str, Any] = dict(n_blocks_per_stage=[1, 2, 2, 2], n_conv_per_stage_decoder=1)
    return [
        plain("PlainConvUNet", "unet", 2, picture, **one),
        plain("PlainConvUNet", "unet", 2, picture, **one, deep_supervision=True),
        plain("PlainConvUNet", "unet", 3, solid, **one, deep_supervision=True),
        plain("ResidualEncoderUNet", "unet", 2, picture, **residual),
        plain("ResidualEncoderUNet", "unet", 3, solid, **residual, deep_supervision=True),
        plain("ResidualUNet", "unet", 2, picture, n_blocks_per_stage=2, n_conv_per_stage_decoder=1),
    ]


# --- Graphs -----------------------------------------------------------------------------------------------------------

NODES, EDGES = 6, 14


class GraphClassifier(nn.Module):
    """A network of torch_geometric on a batch of graphs: one large graph, then the mean over each one's nodes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.classify = body, nn.Linear(16, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """x: (B, nodes, 8), edges: (B, 2, edges) → (B, 4)"""
        start = torch.arange(len(x))[:, None, None] * x.shape[1]
        joined = (edges + start).transpose(0, 1).flatten(1)
        h = self.body(x.flatten(0, 1), joined)
        pooled = package("torch_geometric.nn").global_mean_pool(h, torch.arange(len(x)).repeat_interleave(x.shape[1]))
        out: Tensor = self.classify(pooled)
        return out


class DenseClassifier(nn.Module):
    """Three of torch_geometric's layers for adjacency matrices, with the mask of the nodes that exist."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        dense = package("torch_geometric.nn")

        def one(inputs: int) -> nn.Module:
            built: nn.Module
            if layer == "DenseGINConv":
                built = dense.DenseGINConv(nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 16)))
            else:
                built = getattr(dense, layer)(inputs, 16)
            return built

        self.layers = nn.ModuleList([one(8), one(16), one(16)])
        self.classify = nn.Linear(16, 4)

    def forward(self, x: Tensor, adjacency: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, adjacency, mask).relu()
        out: Tensor = self.classify(x.sum(1) / mask.sum(1, keepdim=True))
        return out


def graphs() -> list[Architecture]:
    family, module = "torch_geometric", "torch_geometric.nn"
    sparse = named(x=floats(NODES, 8), edges=lambda b, s: torch.randint(0, NODES, (b, 2, EDGES), generator=drawn(s)))

    def adjacency(batch: int, seed: int) -> Tensor:
        linked = torch.rand(batch, NODES, NODES, generator=drawn(seed)) < 0.4
        return (linked | linked.transpose(1, 2)).float()

    dense = named(x=floats(NODES, 8), adjacency=adjacency, mask=lambda b, s: padding(NODES)(b, s).bool())  # type: ignore[union-attr]
    size: dict[str, Any] = dict(in_channels=8, hidden_channels=16, out_channels=16, num_layers=4, dropout=0.1)

    def wrapped(name: str, **settings: Any) -> Architecture:
        return Architecture(family, name, lambda: GraphClassifier(made(module, name, **settings)()), sparse)

    return [
        wrapped("GCN", **size),
        wrapped("GraphSAGE", **size),
        wrapped("GIN", **size, norm="batch_norm"),
        wrapped("GAT", **size, heads=2),
        wrapped("PNA", **size, aggregators=["mean", "max"], scalers=["identity"], deg=torch.tensor([0, 4, 4, 4])),
        wrapped("EdgeCNN", **size),
        wrapped("GraphUNet", in_channels=8, hidden_channels=16, out_channels=16, depth=2),
        *[
            Architecture(family, n, functools.partial(DenseClassifier, n), dense)
            for n in ("DenseGCNConv", "DenseSAGEConv", "DenseGINConv", "DenseGraphConv", "DenseGATConv")
        ],
    ]


# --- Brain signals ----------------------------------------------------------------------------------------------------

BRAIN = """
ATCNet AttentionBaseNet BIOT CTNet ContraWR Deep4Net EEGConformer EEGITNet EEGInceptionERP EEGInceptionMI EEGMiner
EEGNeX EEGNet EEGSimpleConv EEGTCNet FBCNet FBLightConvNet FBMSNet IFNet MSVTNet SCCNet SPARCNet ShallowFBCSPNet
SincShallowNet SyncNet TIDNet TSception TCFormer MEDFormer SSTDPN
"""


def brain() -> list[Architecture]:
    signal: dict[str, Any] = dict(n_chans=8, n_times=512, n_outputs=4, sfreq=128, chs_info=None)

    def one(name: str) -> Architecture:
        def build() -> nn.Module:
            network: nn.Module = getattr(package("braindecode.models"), name)(**signal)
            return network

        return Architecture("braindecode", name, build, floats(8, 512))

    return [one(name) for name in BRAIN.split()]


# --- Tables -----------------------------------------------------------------------------------------------------------


class PlainTabNet(nn.Module):
    """pytorch_tabnet's network without its training loop; its outputs are (scores, sparsity loss)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.net = package("pytorch_tabnet.tab_network").TabNet(8, 3, group_attention_matrix=torch.eye(8), **settings)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = self.net(x)
        return out


def tables() -> list[Architecture]:
    family = "tables"
    row = floats(8)
    categories = whole_numbers(4, 2)
    rtdl = "rtdl_revisiting_models"
    block: dict[str, Any] = dict(
        d_block=32,
        n_blocks=3,
        attention_n_heads=4,
        attention_dropout=0.1,
        ffn_d_hidden=None,
        ffn_d_hidden_multiplier=2.0,
        ffn_dropout=0.1,
        residual_dropout=0.1,
    )

    def ctr(name: str, dense: bool = True, **settings: Any) -> Architecture:
        def build() -> nn.Module:
            columns = package("deepctr_torch.inputs")
            features = [columns.SparseFeat(f"c{i}", 5, embedding_dim=4) for i in range(4)] + [
                columns.DenseFeat(f"d{i}", 1) for i in range(4 * dense)
            ]
            wide = {} if name in NO_WIDE else {"linear_feature_columns": features}
            network: nn.Module = getattr(package("deepctr_torch.models"), name)(
                dnn_feature_columns=features, **wide, **settings
            )
            return network

        return Architecture(
            "click-through rates",
            name,
            build,
            lambda b, s: torch.cat(
                [torch.randint(0, 5, (b, 4), generator=drawn(s)).float(), torch.randn(b, 4, generator=drawn(s + 1))], 1
            ),
        )

    small: dict[str, Any] = dict(dnn_hidden_units=(16, 16), dnn_dropout=0.1)
    return [
        Architecture(family, "MLP", made(rtdl, "MLP", d_in=8, d_out=3, n_blocks=3, d_block=32, dropout=0.1), row),
        Architecture(
            family,
            "ResNet",
            made(
                rtdl,
                "ResNet",
                d_in=8,
                d_out=3,
                n_blocks=3,
                d_block=32,
                d_hidden=None,
                d_hidden_multiplier=2.0,
                dropout1=0.1,
                dropout2=0.0,
            ),
            row,
        ),
        Architecture(
            family,
            "FTTransformer",
            made(rtdl, "FTTransformer", n_cont_features=8, cat_cardinalities=[5, 5], d_out=3, **block),
            several(row, categories),
        ),
        Architecture(
            family,
            "TabM",
            made(
                "tabm",
                "TabM",
                n_num_features=8,
                cat_cardinalities=[5, 5],
                d_out=3,
                n_blocks=3,
                d_block=32,
                dropout=0.1,
                k=4,
                arch_type="tabm",
                start_scaling_init="random-signs",
            ),
            several(row, categories),
        ),
        Architecture(
            family,
            "TabM-mini",
            made(
                "tabm",
                "TabM",
                n_num_features=8,
                d_out=3,
                n_blocks=3,
                d_block=32,
                dropout=0.1,
                k=4,
                arch_type="tabm-mini",
                start_scaling_init="random-signs",
            ),
            row,
        ),
        Architecture(family, "TabNet", lambda: PlainTabNet(n_d=8, n_a=8, n_steps=3, virtual_batch_size=128), row),
        ctr("WDL", **small),
        ctr("DeepFM", **small),
        ctr("DCN", **small),
        ctr("DCNMix", **small),
        ctr("xDeepFM", **small),
        ctr("AFM", dense=False),
        ctr("AFN", afn_dnn_hidden_units=(16, 16), ltl_hidden_size=8),
        ctr("AutoInt", **small),
        ctr("NFM", dnn_hidden_units=(16, 16)),
        ctr("PNN", **small),
        ctr("FiBiNET", **small),
        ctr("ONN", **small),
        ctr("IFM", **small),
        ctr("DIFM", **small),
    ]


NO_WIDE = ("PNN",)

# --- Vision transformers with einops ----------------------------------------------------------------------------------


def vit_pytorch() -> list[Architecture]:
    family = "vit-pytorch"
    picture = floats(3, 32, 32)
    size: dict[str, Any] = dict(image_size=32, patch_size=8, num_classes=5, dim=32, depth=4, heads=2, mlp_dim=64)
    drops: dict[str, Any] = dict(dropout=0.1, emb_dropout=0.1)

    def one(file: str, name: str, inputs: Inputs = picture, **settings: Any) -> Architecture:
        return Architecture(family, f"{file}.{name}", made(f"vit_pytorch.{file}", name, **settings), inputs)

    pyramid: dict[str, Any] = dict(num_classes=5, dim=(8, 16, 16, 32), depth=(1, 1, 2, 1))
    return [
        one("vit", "ViT", **size, **drops),
        one("simple_vit", "SimpleViT", **size),
        one("deepvit", "DeepViT", **size, **drops),
        one("cait", "CaiT", **size, cls_depth=1, layer_dropout=0.05),
        one("parallel_vit", "ViT", **size, num_parallel_branches=2),
        one("rvt", "RvT", **size),
        one("learnable_memory_vit", "ViT", **size),
        one("vit_for_small_dataset", "ViT", **size),
        one("vit_with_patch_merger", "ViT", **size, patch_merge_layer=2, patch_merge_num_tokens=4),
        one("vit_with_patch_dropout", "ViT", **size, patch_dropout=0.25),
        one("simple_vit_with_patch_dropout", "SimpleViT", **size),
        one("simple_vit_with_register_tokens", "SimpleViT", **size),
        one("simple_vit_with_qk_norm", "SimpleViT", **size),
        one("simple_vit_with_value_residual", "SimpleViT", **size),
        one("normalized_vit", "nViT", image_size=32, patch_size=8, num_classes=5, dim=32, depth=4, heads=2, mlp_dim=64),
        one(
            "t2t",
            "T2TViT",
            image_size=32,
            num_classes=5,
            dim=32,
            depth=3,
            heads=2,
            mlp_dim=64,
            t2t_layers=((7, 4), (3, 2)),
        ),
        one(
            "cct",
            "CCT",
            img_size=32,
            embedding_dim=32,
            num_layers=4,
            num_heads=2,
            mlp_ratio=2,
            num_classes=5,
            n_conv_layers=1,
            kernel_size=7,
            stride=2,
            padding=3,
            pooling_kernel_size=3,
            pooling_stride=2,
            pooling_padding=1,
            positional_embedding="learnable",
        ),
        one(
            "cross_vit",
            "CrossViT",
            image_size=32,
            num_classes=5,
            sm_dim=16,
            lg_dim=32,
            depth=2,
            sm_patch_size=8,
            lg_patch_size=16,
            sm_enc_heads=2,
            lg_enc_heads=2,
            cross_attn_heads=2,
        ),
        one("pit", "PiT", image_size=32, patch_size=8, dim=32, num_classes=5, depth=(2, 2), heads=2, mlp_dim=64),
        one(
            "levit",
            "LeViT",
            floats(3, 64, 64),
            image_size=64,
            num_classes=5,
            stages=3,
            dim=(16, 24, 32),
            depth=2,
            heads=(2, 2, 2),
            mlp_mult=2,
        ),
        one(
            "cvt",
            "CvT",
            num_classes=5,
            s1_emb_dim=16,
            s1_depth=1,
            s1_heads=1,
            s2_emb_dim=24,
            s2_depth=1,
            s2_heads=2,
            s3_emb_dim=32,
            s3_depth=2,
            s3_heads=2,
        ),
        one(
            "twins_svt",
            "TwinsSVT",
            floats(3, 64, 64),
            num_classes=5,
            s1_emb_dim=8,
            s1_local_patch_size=4,
            s1_global_k=4,
            s2_emb_dim=16,
            s2_local_patch_size=4,
            s2_global_k=4,
            s3_emb_dim=16,
            s3_local_patch_size=2,
            s3_global_k=2,
            s3_depth=1,
            s4_emb_dim=32,
            s4_local_patch_size=1,
            s4_global_k=1,
            s4_depth=1,
        ),
        one(
            "crossformer",
            "CrossFormer",
            floats(3, 64, 64),
            **{**pyramid, "dim": (32, 32, 32, 32)},
            global_window_size=(4, 2, 2, 1),
            local_window_size=2,
        ),
        one("regionvit", "RegionViT", floats(3, 64, 64), **pyramid, window_size=2),
        one(
            "scalable_vit",
            "ScalableViT",
            floats(3, 64, 64),
            num_classes=5,
            dim=8,
            heads=(1, 2, 2, 4),
            depth=(1, 1, 2, 1),
            ssa_dim_key=(8, 8, 8, 8),
            reduction_factor=(4, 2, 2, 1),
            window_size=(4, 4, None, None),
        ),
        one(
            "max_vit",
            "MaxViT",
            floats(3, 64, 64),
            num_classes=5,
            dim_conv_stem=8,
            dim=8,
            dim_head=8,
            depth=(1, 1, 1),
            window_size=2,
        ),
        one(
            "nest",
            "NesT",
            image_size=32,
            patch_size=4,
            dim=16,
            heads=2,
            num_hierarchies=3,
            block_repeats=(2, 2, 2),
            num_classes=5,
        ),
        one(
            "mobile_vit",
            "MobileViT",
            floats(3, 64, 64),
            image_size=(64, 64),
            dims=[16, 24, 32],
            channels=[8, 8, 8, 8, 16, 16, 16, 16, 24, 24, 32],
            num_classes=5,
        ),
        one("xcit", "XCiT", **size, cls_depth=1, layer_dropout=0.05),
        one(
            "vit_1d",
            "ViT",
            floats(3, 64),
            seq_len=64,
            patch_size=8,
            num_classes=5,
            dim=32,
            depth=4,
            heads=2,
            mlp_dim=64,
        ),
        one(
            "vit_3d",
            "ViT",
            floats(3, 4, 32, 32),
            image_size=32,
            frames=4,
            image_patch_size=8,
            frame_patch_size=2,
            num_classes=5,
            dim=32,
            depth=4,
            heads=2,
            mlp_dim=64,
        ),
        one(
            "vivit",
            "ViViT",
            floats(3, 4, 32, 32),
            image_size=32,
            frames=4,
            image_patch_size=8,
            frame_patch_size=2,
            num_classes=5,
            dim=32,
            spatial_depth=2,
            temporal_depth=2,
            heads=2,
            mlp_dim=64,
        ),
        one("simple_uvit", "SimpleUViT", **size),
        one("ats_vit", "ViT", **size, max_tokens_per_depth=(12, 10, 8, 6)),
        one("jumbo_vit", "JumboViT", **size, num_jumbo_cls=1, jumbo_cls_k=2, jumbo_ff_mult=2),
    ]


def x_transformers() -> list[Architecture]:
    family = "x-transformers"
    words = whole_numbers(100, 12)
    masked = named(x=words, mask=lambda b, s: padding(12)(b, s).bool())  # type: ignore[union-attr]

    def one(name: str, inputs: Inputs = words, layers: str = "Encoder", **settings: Any) -> Architecture:
        def build() -> nn.Module:
            lib = package("x_transformers")
            inner = getattr(lib, layers)(dim=32, depth=4, heads=2, **settings)
            network: nn.Module = lib.TransformerWrapper(num_tokens=100, max_seq_len=16, attn_layers=inner)
            return network

        return Architecture(family, name, build, inputs)

    def sight() -> nn.Module:
        lib = package("x_transformers")
        network: nn.Module = lib.ViTransformerWrapper(
            image_size=32, patch_size=8, num_classes=5, attn_layers=lib.Encoder(dim=32, depth=4, heads=2)
        )
        return network

    def continuous() -> nn.Module:
        lib = package("x_transformers")
        network: nn.Module = lib.ContinuousTransformerWrapper(
            dim_in=8, dim_out=4, max_seq_len=16, attn_layers=lib.Encoder(dim=32, depth=4, heads=2)
        )
        return network

    return [
        one("Encoder"),
        one("Encoder_masked", masked),
        one("Decoder", layers="Decoder"),
        one("Encoder_rotary", rotary_pos_emb=True),
        one("Encoder_alibi", masked, alibi_pos_bias=True),
        one("Encoder_t5_bias", masked, rel_pos_bias=True),
        one("Encoder_rms_glu", use_rmsnorm=True, ff_glu=True, ff_swish=True),
        one("Encoder_drops", attn_dropout=0.1, ff_dropout=0.1, layer_dropout=0.0),
        one("Decoder_qk_norm", layers="Decoder", attn_qk_norm=True),
        one("Encoder_macaron", macaron=True),
        one("Encoder_residual_gates", gate_residual=True),
        Architecture(family, "ViTransformerWrapper", sight, floats(3, 32, 32)),
        Architecture(family, "ContinuousTransformerWrapper", continuous, floats(12, 8)),
    ]


# --- More -------------------------------------------------------------------------------------------------------------

PYTORCHCV = """
preresnet10 bam_resnet18 cbam_resnet18 igcv3_wd2 menet108_8x1_g3 peleenet darknet_tiny condensenet74_c4_g4
mobilenet_wd4 fdmobilenet_wd4 proxylessnas_cpu spnasnet sqnxt23_w1 dicenet_wd5 nin_cifar10
xdensenet40_2_k24_bc_cifar10 resnet20_cifar10 shakeshakeresnet20_2x16d_cifar10 diaresnet20_cifar10
resdropresnet20_cifar10 shakedropresnet20_cifar10 densenet40_k12_cifar10 sepreresnet20_cifar10 rir_cifar10
"""


def pytorchcv() -> list[Architecture]:
    return [
        Architecture(
            "pytorchcv",
            name,
            made("pytorchcv.model_provider", "get_model", name, pretrained=False),
            floats(3, 32, 32) if name.endswith("cifar10") else floats(3, 224, 224),
        )
        for name in PYTORCHCV.split()
    ]


def diffusers() -> list[Architecture]:
    family = "diffusers"
    noisy = several(floats(3, 16, 16), whole_numbers(50))
    small: dict[str, Any] = dict(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4
    )
    text_states = named(sample=floats(3, 16, 16), timestep=whole_numbers(50), encoder_hidden_states=floats(5, 16))
    return [
        Architecture(
            family,
            "UNet2DModel",
            made(
                "diffusers",
                "UNet2DModel",
                **small,
                attention_head_dim=4,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            ),
            noisy,
        ),
        Architecture(
            family,
            "UNet2DConditionModel",
            made(
                "diffusers",
                "UNet2DConditionModel",
                **small,
                cross_attention_dim=16,
                attention_head_dim=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            ),
            text_states,
        ),
        Architecture(
            family,
            "AutoencoderKL",
            made(
                "diffusers",
                "AutoencoderKL",
                in_channels=3,
                out_channels=3,
                block_out_channels=(8, 16),
                layers_per_block=1,
                latent_channels=2,
                norm_num_groups=4,
                down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
                up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            ),
            floats(3, 16, 16),
        ),
        Architecture(
            family,
            "VQModel",
            made(
                "diffusers",
                "VQModel",
                block_out_channels=(8, 16),
                layers_per_block=1,
                latent_channels=3,
                norm_num_groups=4,
                num_vq_embeddings=16,
                down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
                up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            ),
            floats(3, 16, 16),
        ),
        Architecture(
            family,
            "DiTTransformer2DModel",
            made(
                "diffusers",
                "DiTTransformer2DModel",
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=3,
                out_channels=3,
                num_layers=4,
                sample_size=16,
                patch_size=4,
                num_embeds_ada_norm=50,
                norm_num_groups=4,
            ),
            named(hidden_states=floats(3, 16, 16), timestep=whole_numbers(50), class_labels=whole_numbers(40)),
        ),
    ]


class Recurrent(nn.Module):
    """Token embedding, a recurrent network of torch.nn, the mean over places."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([getattr(nn, kind)(16, 16, batch_first=True) for _ in range(3)])
        self.classify = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for layer in self.layers:
            h, _ = layer(h)
        out: Tensor = self.classify(h.mean(1))
        return out


class Encoder(nn.Module):
    """nn.TransformerEncoder with a padding mask."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.classify = nn.Linear(32, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        out: Tensor = self.classify(h.mean(1))
        return out


def own() -> list[Architecture]:
    family = "torch.nn"
    words = whole_numbers(50, 10)
    both = several(floats(6, 32), floats(5, 32))
    return [
        *[Architecture(family, kind, functools.partial(Recurrent, kind), words) for kind in ("LSTM", "GRU", "RNN")],
        Architecture(family, "TransformerEncoder", functools.partial(Encoder, False), text()),
        Architecture(family, "TransformerEncoder_norm_first", functools.partial(Encoder, True), text()),
        Architecture(
            family,
            "Transformer",
            made(
                "torch.nn",
                "Transformer",
                d_model=32,
                nhead=2,
                num_encoder_layers=2,
                num_decoder_layers=2,
                dim_feedforward=64,
                batch_first=True,
            ),
            both,
        ),
        Architecture(
            family,
            "Conformer",
            made("conformer", "Conformer", dim=32, depth=3, dim_head=16, heads=2, conv_kernel_size=7),
            floats(12, 32),
        ),
        Architecture(family, "torchaudio.Conformer", lambda: _AudioConformer(), floats(12, 32)),
        Architecture(
            family,
            "torchaudio.Wav2Letter",
            made("torchaudio.models", "Wav2Letter", num_classes=10, input_type="waveform", num_features=1),
            floats(1, 3200),
        ),
        Architecture(
            family,
            "torchaudio.ConvTasNet",
            made(
                "torchaudio.models",
                "ConvTasNet",
                num_sources=2,
                enc_kernel_size=16,
                enc_num_feats=16,
                msk_kernel_size=3,
                msk_num_feats=8,
                msk_num_hidden_feats=16,
                msk_num_layers=3,
                msk_num_stacks=2,
            ),
            floats(1, 800),
        ),
        Architecture(
            family,
            "torchaudio.HDemucs",
            made("torchaudio.models", "HDemucs", sources=["a", "b"], audio_channels=1, channels=4, nfft=256, depth=3),
            floats(1, 4096),
        ),
    ]


class _AudioConformer(nn.Module):
    """torchaudio's, which also wants the lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.body = package("torchaudio.models").Conformer(
            input_dim=32, num_heads=2, ffn_dim=64, num_layers=4, depthwise_conv_kernel_size=7
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x, torch.full((len(x),), x.shape[1]))[0]
        return out


def every() -> list[Architecture]:
    """All, family by family."""
    groups = (
        own,
        torchvision,
        torchvision_dense,
        torchvision_video,
        timm_convolutions,
        timm_attention,
        pytorchcv,
        text_encoders,
        adapters,
        text_decoders,
        sequence_to_sequence,
        vision_transformers,
        audio,
        several_inputs,
        monai,
        segmentation_models,
        nnunet,
        graphs,
        brain,
        tables,
        vit_pytorch,
        x_transformers,
        diffusers,
    )
    return [architecture for group in groups for architecture in group()]
