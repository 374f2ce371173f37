"""GGUF files of architecture `llama`, quantized by gguf-py."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize


def tensor_type(name, matrix_type):
    """The embedding doubles as the output matrix and keeps 8 bits; norms stay whole."""
    if name.endswith("norm.weight"):
        return Type.F32
    return Type.Q8_0 if name == "token_embd.weight" else matrix_type


def quantized(tensors, matrix_type):
    for name, array in tensors.items():
        kind = tensor_type(name, matrix_type)
        yield name, kind, quantize(np.ascontiguousarray(array, np.float32), kind)


def size(tensors, matrix_type):
    """Bytes of all weights in a file of this type."""
    return sum(data.nbytes for _, _, data in quantized(tensors, matrix_type))


def write(path, tensors, config, sp, name, description, matrix_type):
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name(name)
    w.add_description(description)
    w.add_license("MIT")
    w.add_file_type(gguf.LlamaFileType["MOSTLY_" + matrix_type.name])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_context_length(config.context)
    w.add_embedding_length(config.width)
    w.add_block_count(config.layers)
    w.add_feed_forward_length(config.ffn)
    w.add_head_count(config.heads)
    w.add_head_count_kv(config.heads)
    w.add_layer_norm_rms_eps(config.eps)
    w.add_rope_dimension_count(config.width // config.heads)
    w.add_rope_freq_base(config.rope_base)
    w.add_vocab_size(config.vocab)

    kinds = [gguf.TokenType.UNKNOWN if sp.is_unknown(i) else gguf.TokenType.CONTROL if sp.is_control(i)
             else gguf.TokenType.BYTE if sp.is_byte(i) else gguf.TokenType.NORMAL for i in range(len(sp))]
    w.add_tokenizer_model("llama")
    w.add_token_list([sp.id_to_piece(i).encode() for i in range(len(sp))])
    w.add_token_scores([sp.get_score(i) for i in range(len(sp))])
    w.add_token_types(kinds)
    w.add_unk_token_id(sp.unk_id())
    w.add_bos_token_id(sp.bos_id())
    w.add_eos_token_id(sp.eos_id())
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(True)

    for tensor, kind, data in quantized(tensors, matrix_type):
        w.add_tensor(tensor, data, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
