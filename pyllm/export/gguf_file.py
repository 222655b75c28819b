"""One file that llama.cpp loads: GGUF, written with the ``gguf`` package.

llama.cpp's architecture ``llama`` is Llama and, with ``expert_count``, Mixtral. Names and layout
are those of its converter from Hugging Face folders (``conversion/llama.py``, once
``convert_hf_to_gguf.py``) and what ``src/models/llama.cpp`` reads.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyllm._durable import named_errors, sync
from pyllm.export._checks import check_exportable, check_free, narrowed
from pyllm.export.gguf_vocabulary import gguf_vocabulary
from pyllm.export.text_settings import TextSettings, without_generation_marks
from pyllm.layers.rope_scaling import rotation
from pyllm.models import ModelConfig, Transformer
from pyllm.models.hugging_face import check_expressible
from pyllm.tokenizers import Tokenizer

if TYPE_CHECKING:
    import gguf

GGUF_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""Our name of a dtype, and ggml's. ``q8_0``: 32 numbers share a float16 scale, 8 bits each."""
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
_Q8_BLOCK = 32


def write_gguf(
    path: str | Path,
    model: Transformer,
    tokenizer: Tokenizer,
    dtype: str = "auto",
    texts: TextSettings | None = None,
    name: str = "pyllm",
) -> None:
    """Write a GGUF file, whole or not at all.

    Norms and routers stay float32 in any dtype, as llama.cpp's converter has it. Besides the ends
    that the file names, llama.cpp takes every token for one that is spelled like one it knows
    (``<|endoftext|>``, ``<|im_end|>``, ``<|eot_id|>``).

    Args:
        path: must not exist.
        model: dense or with experts in every layer, without a window shorter than its context.
        tokenizer: whose vocabulary goes into the file.
        dtype: of the matrices: ``float32``, ``float16``, ``bfloat16`` or ``q8_0``; ``auto``: as the
            weights are.
        texts: how they begin and end; by default with end-of-text, as in pyllm's training. Marks
            of generation are taken out of the chat template.
        name: shown by programs that load the file.

    Raises:
        ValueError: the path exists, the package is not installed, an unknown dtype or one that
            cannot hold the numbers, a model or a tokenizer that llama.cpp does not have.
        OSError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    check_free(path)
    check_exportable(model)
    package = _package()
    if dtype == "auto":
        dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    if dtype not in GGUF_DTYPES:
        raise ValueError(
            f"dtype {dtype} is not one of a gguf export; expected auto, {', '.join(GGUF_DTYPES)}"
        )
    _check_model(model, dtype)
    texts = TextSettings.of_tokenizer(tokenizer) if texts is None else texts
    _check_texts(texts)
    kind = package.GGMLQuantizationType[GGUF_DTYPES[dtype]]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    writer = package.GGUFWriter(temporary, package.MODEL_ARCH_NAMES[package.MODEL_ARCH.LLAMA])
    try:
        _add_metadata(writer, model.config)
        writer.add_type(package.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_file_type(package.LlamaFileType[_FILE_TYPES[kind.name]])
        writer.add_quantization_version(package.GGML_QUANT_VERSION)
        _add_tokenizer(writer, tokenizer, model.config.vocab_size, texts)
        if texts.chat_template is not None:
            writer.add_chat_template(without_generation_marks(texts.chat_template))
        for tensor_name, tensor in gguf_tensors(model):
            matrix = tensor.dim() > 1 and not tensor_name.endswith("ffn_gate_inp.weight")
            own = kind if matrix else package.GGMLQuantizationType.F32
            narrowest = torch.float16 if own.name == "F16" else torch.float32
            numbers = narrowed(tensor_name, tensor, narrowest).float().numpy()
            writer.add_tensor(tensor_name, package.quants.quantize(numbers, own), raw_dtype=own)
        with named_errors(path):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        sync(temporary)
        temporary.rename(path)
    except BaseException:
        writer.close()
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise ValueError(
            "writing gguf needs the package gguf, which is not installed; pip install gguf"
        ) from None
    return gguf


def _check_model(model: Transformer, dtype: str) -> None:
    config = model.config
    check_expressible(config)
    if config.window is not None and config.window < config.max_seq_len:
        raise ValueError(
            f"the model's window is {config.window}, and llama.cpp's llama architecture lets every "
            "token see all before it; it cannot be exported to gguf; --to hf can"
        )
    for what, width in (("d_model", config.d_model), ("d_ff", config.d_ff)):
        if dtype == "q8_0" and width % _Q8_BLOCK:
            raise ValueError(
                f"the model's {what} is {width}, and q8_0 stores rows in blocks of {_Q8_BLOCK}; "
                "choose another dtype"
            )


def _check_texts(texts: TextSettings) -> None:
    if len(texts.begin_ids) > 1:
        raise ValueError(
            f"a text begins with {len(texts.begin_ids)} tokens ({list(texts.begin_ids)}), and gguf "
            "has one, bos; it cannot be exported to gguf; --to hf can"
        )
    if len(texts.stop_ids) > 3:
        raise ValueError(
            f"{len(texts.stop_ids)} tokens end a text ({list(texts.stop_ids)}), and gguf has "
            "three, eos, eot and eom; it cannot be exported to gguf; --to hf can"
        )


def _add_metadata(writer: "gguf.GGUFWriter", config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(_package().RopeScalingType(config.rope_scaling))
        writer.add_rope_scaling_factor(config.rope_factor)
    if config.rope_scaling == "yarn":
        assert config.rope_original_len is not None
        writer.add_rope_scaling_orig_ctx_len(config.rope_original_len)
    if config.moe_every:
        writer.add_expert_count(config.n_experts)
        writer.add_expert_used_count(config.top_k)


def _add_tokenizer(
    writer: "gguf.GGUFWriter", tokenizer: Tokenizer, size: int, texts: TextSettings
) -> None:
    vocabulary = gguf_vocabulary(tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    bos = texts.bos_id(tokenizer)
    # Without one, llama.cpp takes GPT-2's ids 11 for both.
    writer.add_bos_token_id(tokenizer.end_of_text_id if bos is None else bos)
    writer.add_eos_token_id(next(iter(texts.stop_ids), tokenizer.end_of_text_id))
    for add, stop in zip(
        (writer.add_eot_token_id, writer.add_eom_token_id), texts.stop_ids[1:], strict=False
    ):
        add(stop)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(bool(texts.begin_ids))
    writer.add_add_eos_token(False)


def gguf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The tensors under llama.cpp's names, in its layout: experts stacked, queries and keys turned
    as :func:`interleave` says.

    Scaling as in Llama 3.1 has no key of its own there: it is a tensor ``rope_freqs`` by which each
    plane's frequency is divided.
    """
    config, state = model.config, model.state_dict()
    yield "token_embd.weight", state["embedding.weight"]
    yield "output_norm.weight", state["final_norm.weight"]
    if not config.tie_embeddings:
        yield "output.weight", state["output.weight"]
    if config.rope_scaling == "llama3":
        plain = rotation(config.head_dim, config.rope_theta)
        scaled = rotation(
            config.head_dim,
            config.rope_theta,
            config.rope_scaling,
            config.rope_factor,
            config.rope_original_len,
        )
        yield "rope_freqs.weight", plain.frequency_J / scaled.frequency_J
    kv_rows = config.n_kv_heads * config.head_dim
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"blk.{layer}"
        q, k, v = state[f"{ours}.attention.qkv_proj.weight"].split(
            [config.d_model, kv_rows, kv_rows]
        )
        yield f"{theirs}.attn_norm.weight", state[f"{ours}.attention_norm.weight"]
        yield f"{theirs}.attn_q.weight", interleave(q, config.n_heads)
        yield f"{theirs}.attn_k.weight", interleave(k, config.n_kv_heads)
        yield f"{theirs}.attn_v.weight", v
        yield f"{theirs}.attn_output.weight", state[f"{ours}.attention.out_proj.weight"]
        yield f"{theirs}.ffn_norm.weight", state[f"{ours}.ffn_norm.weight"]
        if config.is_moe(layer):
            gate, up = state[f"{ours}.ffn.w_in"].chunk(2, dim=1)
            yield f"{theirs}.ffn_gate_inp.weight", state[f"{ours}.ffn.router"]
            yield f"{theirs}.ffn_gate_exps.weight", gate
            yield f"{theirs}.ffn_up_exps.weight", up
            yield f"{theirs}.ffn_down_exps.weight", state[f"{ours}.ffn.w_out"]
        else:
            gate, up = state[f"{ours}.ffn.in_proj.weight"].chunk(2)
            yield f"{theirs}.ffn_gate.weight", gate
            yield f"{theirs}.ffn_up.weight", up
            yield f"{theirs}.ffn_down.weight", state[f"{ours}.ffn.out_proj.weight"]


def interleave(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of each head from Llama's rotary layout in Hugging Face to the one in llama.cpp.

    Here channel ``i`` of a head's first half and channel ``i`` of its second half turn together;
    there, for this architecture, neighbours do (``LLAMA_ROPE_TYPE_NORM``), as in Meta's own code.
    The converter's ``LlamaModel.permute``. Queries and keys are permuted alike, so that their
    products stay what they were.
    """
    halves = weight.unflatten(0, (n_heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape)
