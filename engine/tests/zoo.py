"""Small random language models of many architectures, and their tokenizers' two kinds."""

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 320
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "pad_token_id": 0,
         "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"sliding_window": 8}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 32}
DELTA = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
       "v_head_dim": 8, "num_key_value_heads": 4}
ROUTED = {**EXPERTS, **MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
          "first_k_dense_replace": 1}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
GPTJ = {"rotary_dim": 4}
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}

# what transformers calls it -> the sizes that it has beside SIZES. "name, variant" is one of two
ZOO = {
    "gpt2": {}, "gptj": GPTJ, "gpt_neox": {}, "gpt_bigcode": {}, "codegen": GPTJ, "llama": {},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 64, "do_layer_norm_before": False},
    "mixtral": EXPERTS, "qwen2": {}, "qwen2_moe": EXPERTS, "qwen3": {}, "qwen3_moe": EXPERTS,
    "gemma": {}, "phi": {}, "phimoe": EXPERTS, "stablelm": {}, "olmo": {}, "olmo2": {},
    "olmoe": EXPERTS, "granite": {}, "granitemoe": EXPERTS, "cohere": {}, "smollm3": {},
    "nemotron": {}, "persimmon": {}, "helium": {}, "glm": {}, "glm4": {}, "ernie4_5": {},
    "arcee": {}, "apertus": {}, "falcon": {"head_dim": None}, "seed_oss": {}, "nanochat": {},
    "deepseek_v2": ROUTED, "deepseek_v3": {**ROUTED, "qk_head_dim": 16}, "minicpm3": MLA,
    "hunyuan_v1_dense": {}, "bitnet": {}, "diffllama": {}, "doge": {}, "ministral3": {},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64}, "biogpt": {},
    "ctrl": {"dff": 64}, "bert, is_decoder": {"is_decoder": True},
    # a window of attention
    "mistral": WINDOW, "phi3": WINDOW, "starcoder2": WINDOW, "gemma2": MIXED, "olmo3": MIXED,
    "qwen2, window": {"use_sliding_window": True, "max_window_layers": 1, **WINDOW},
    "gemma3_text": MIXED, "gemma3": {}, "cohere2": MIXED, "exaone4": MIXED, "vaultgemma": MIXED,
    "gemma3n_text": {**MIXED, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCAB,
                     "hidden_size_per_layer_input": 8, "laurel_rank": 4,
                     "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [64, 64]},
    "gpt_oss": {**EXPERTS, **MIXED, "rope_parameters": {"rope_type": "default",
                                                        "rope_theta": 1e4}},
    "gpt_neo": {"window_size": 8, "attention_types": [[["global", "local"], 1]]},
    "ministral": MIXED, "modernbert-decoder": {"layer_types": MIXED["layer_types"],
                                               "local_attention": 8},
    "llama4_text": {**EXPERTS, "attention_chunk_size": 8, "intermediate_size_mlp": 64},
    # distance by column and not by position_ids
    "bloom": {}, "mpt": {"max_seq_len": 512}, "falcon, alibi": {
        "head_dim": None, "alibi": True, "new_decoder_architecture": False},
    # a state that goes from token to token
    "qwen3_next": {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": DELTA, "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {**EXPERTS, **STATE, "layer_types": ["mamba", "attention"],
                         "shared_intermediate_size": 32},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1},
    "falcon_h1": {**STATE, "mamba_d_ssm": 64}, "bamba": {**STATE, "attn_layer_indices": [1]},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
              "mamba_d_state": 8, "use_mamba_kernels": False},
    # refused
    "mamba": {"state_size": 8}, "falcon_mamba": {"state_size": 8}, "minimax": {
        **EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 32, "context_length": 512}, "openai-gpt": {},
    "xlstm": {"num_heads": 4, "num_blocks": 2}, "roberta": {}, "bart": BART,
}


def config_of(name):
    """A small config of the architecture."""
    kind = name.split(",")[0]
    if kind == "gemma3":  # sizes in text_config, beside those of an image part
        return transformers.Gemma3Config(
            text_config={**SIZES, **MIXED}, mm_tokens_per_image=4, image_token_index=VOCAB - 1,
            boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3, vision_config={
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                "num_attention_heads": 2, "image_size": 32, "patch_size": 8})
    default = AutoConfig.for_model(kind)
    sizes = {key: value for key, value in SIZES.items() if hasattr(default, key)} | ZOO[name]
    return AutoConfig.for_model(
        kind, **{key: value for key, value in sizes.items() if value is not None})


def build(name, seed=3, scale=3.0):
    """A model with larger weights than usual, so that its outputs are not all alike."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(scale)
    return model
