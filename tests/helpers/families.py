"""Tiny random models of every kind of causal LM that transformers has, and what is checked of each: that the log-probs,
the gradients and the sampled tokens are those of the plainest computation, one row at a time, without padding and
without a cache."""
import contextlib
import copy
import tempfile

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import common
import modeling
import grpo
import ppo
from helpers.unit import make_run, word_tokenizer

V = 64  # tokens of every tiny model: 0 pads, 1 ends, 2 begins
TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# --- models

# a config gets the sizes whose names it has
SIZES = {name: size for size, names in {
    1: "n_group topk_group num_expert_group n_shared_experts num_dense_layers first_k_dense_replace",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
          num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads
          num_experts_per_tok num_experts_per_token moe_topk top_k_experts moe_k moe_num_shared_experts""",
    4: """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads
          num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads
          mamba_n_heads n_mamba_heads mamba_num_heads mamba_dt_rank time_step_rank
          sliding_window sliding_window_size attention_window_size window_size attention_chunk_size local_attention
          index_topk rel_extent floor_scale rotary_dim num_experts num_local_experts n_routed_experts
          moe_num_experts""",
    8: """head_dim dim_head d_head swa_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_head_dim
          linear_key_head_dim linear_value_head_dim d_rel mamba_d_state state_size ssm_state_size chunk_size
          mamba_chunk_size block_size laurel_rank""",
    16: """index_n_heads moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
           shared_experts_intermediate_size moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank o_lora_rank
           index_head_dim mamba_d_head mamba_head_dim mamba_headdim router_hidden_size
           hidden_size_per_layer_input""",
    32: """hidden_size d_model n_embd emb_dim embedding_size embedding_dim lru_width input_embedding_size
           output_embedding_size""",
    48: """intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner ffn_hidden_size
           intermediate_size_mlp dense_intermediate_size shared_intermediate_size prefix_dense_intermediate_size
           feed_forward_size""",
    64: """vocab_size unpadded_vocab_size vocab_size_per_layer_input max_position_embeddings n_positions n_ctx
           max_seq_len context_length model_max_length max_target_positions""",
}.items() for name in names.split()}
SIZES |= {"is_decoder": True}

LINEAR, SLIDING, FULL = "linear_attention", "sliding_attention", "full_attention"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DOTS3 = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
         "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}
QWEN4 = {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
         "indexer_compress_ratio": 2, "ple_layer_ids": [1], "ngram_vocab_size_base": 64, "split_ngram_parts": 2,
         "heads_per_ngram": 2, "make_ngram_vocab_size_divisible_by": 8, "layer_types": [LINEAR, "indexed_attention"]}
LLAMA4 = {"no_rope_layers": [1, 0], "interleave_moe_layer_step": 2}

# what a model type needs besides, so that it can be built, and has each kind of its layers
CHANGES = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "decoder_config": {"hidden_size_global": 32}},
    "cohere_compass_text": {"layer_types": [SLIDING, FULL], "rope_parameters": {SLIDING: ROPE, FULL: ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2, "num_hidden_layers": 6,
             "layer_types": [SLIDING, "mlp", FULL, "mlp", SLIDING, "mlp"]},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {"layer_types": [SLIDING, FULL]},
    "dots3_note": {"text_config": DOTS3, "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
                   "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32}},
    "dots3_note_text": DOTS3,
    "falcon_h1": {"mamba_d_ssm": 64},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [SLIDING, FULL] * 2,
                     "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "intermediate_size": [48] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL]},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": [SLIDING, FULL]},
    "lfm2": {"layer_types": ["conv", FULL]},
    "lfm2_moe": {"layer_types": ["conv", FULL]},
    "llama4": {"text_config": LLAMA4},
    "llama4_text": LLAMA4,
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "mellum": {"layer_types": [SLIDING, FULL]},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", FULL], "mlp_layer_types": ["dense", "sparse"],
                           "index_n_heads": 2, "index_block_size": 2, "index_topk_blocks": 2},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "nemotron_h": {"n_groups": 2},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16],
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "attention_head_size": 8},
    "roc_bert": {"shape_vocab_size": 64, "shape_embed_dim": 16, "pronunciation_vocab_size": 64,
                 "pronunciation_embed_dim": 16},
    "smollm3": {"use_sliding_window": True, "no_rope_layers": [1, 0], "layer_types": [SLIDING, FULL]},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"pad_token_id": None},  # loading it sets its embedding to 0, even where that is shared with the head
    "zamba": {"num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"]},
}

# other models of a type, that compute differently
VARIANTS = {
    "bert, not a decoder": {"is_decoder": False},
    "falcon, alibi": {"alibi": True},
    "falcon, new decoder": {"new_decoder_architecture": True},
    "gemma4_text, shared layers": {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                                   "layer_types": [SLIDING, FULL] * 2, "enable_moe_block": True},
    "gpt2, scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "llama, dynamic rope": {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0},
                            "max_position_embeddings": 8},  # stretched for rows with more tokens
    "opt, norms last": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "phi3, long rope": {"original_max_position_embeddings": 8, "rope_parameters": ROPE | {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 8}},
    "qwen2, window": {"use_sliding_window": True, "layer_types": [SLIDING, FULL]},
    "qwen3, window": {"use_sliding_window": True, "layer_types": [SLIDING, FULL]},
    "xlm, not causal": {"causal": False},
    "xlnet, not causal": {"attn_type": "bi"},
}

NOT_BUILT = {
    "gemma3n": "needs timm, for images; its text model is gemma3n_text",
    "gemma4_assistant": "drafts for another model, from that model's states",
    "gemma4_unified_assistant": "drafts for another model, from that model's states",
    "musicgen": "AutoModelForCausalLM does not build it from its own config; predicts audio codes",
    "musicgen_melody": "AutoModelForCausalLM does not build it from its own config; predicts audio codes",
}


def tiny_config(config_class, changes=None):
    """A config with the SIZES that it has, and a layer of each kind; the configs inside of it likewise."""
    changes, default = changes or {}, vars(config_class())
    sizes = {name: SIZES[name] for name in default if name in SIZES}
    sizes |= {name: i for i, name in enumerate(["pad_token_id", "eos_token_id", "bos_token_id"]) if name in default}
    if "kv_lora_rank" in default and "num_key_value_heads" in default:  # latent attention has a key for each head
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    kinds = {name: list(dict.fromkeys(value)) for name, value in default.items()  # layer_types, mlp_layer_types, ...
             if isinstance(value, list) and len(value) == default.get("num_hidden_layers")
             and all(isinstance(kind, str) for kind in value)}
    if kinds:
        layers = max(2, *map(len, kinds.values()))
        sizes["num_hidden_layers"] = layers
        sizes |= {name: (value + value[-1:] * layers)[:layers] for name, value in kinds.items()}
    inner = {name: tiny_config(type(value), changes.get(name)) for name, value in default.items()
             if isinstance(value, PretrainedConfig)}
    return config_class(**{**sizes, **changes, **inner})


def tiny_model(name: str):
    """A random float32 model of a type ("llama") or a variant ("opt, norms last"): in eval mode, without a cache."""
    model_type = name.partition(",")[0]
    config = tiny_config(CONFIG_MAPPING[model_type], CHANGES.get(model_type, {}) | VARIANTS.get(name, {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        use_cache(model, False)
        randomize(model)
    model.whole_config = config  # of which some types' models keep the inner config of the text alone
    # what a model's folder says of sampling is no concern of the scripts, except for how completions end
    model.generation_config.update(eos_token_id=1, do_sample=True, temperature=0.5, top_k=5, top_p=0.5,
                                   repetition_penalty=1.5, no_repeat_ngram_size=2)
    return model


def use_cache(model, value: bool):
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = value


def load(plain):
    """The model as the scripts have it: saved, and loaded by modeling.load_causal_lm."""
    with tempfile.TemporaryDirectory() as folder:
        saved = copy.deepcopy(plain)
        use_cache(saved, True)
        saved.save_pretrained(folder)
        if type(saved.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            saved.whole_config.save_pretrained(folder)
        return modeling.load_causal_lm(folder, "cpu").eval()


@torch.no_grad()
def randomize(model):
    """Makes each weight matter: matrices of the size at which they keep their input's size, no bias 0 and no norm
    exactly 1, and logits with a standard deviation of 2."""
    for weights in model.parameters():
        noise = torch.randn_like(weights)
        if not weights.any():
            weights += 0.1 * noise
        elif weights.ndim > 1 and weights.mean().abs() < 0.5 * weights.std():
            weights.copy_(noise * weights.shape[-1] ** -0.5)
        else:
            weights *= 1 + 0.1 * noise
    ids = list(range(3, 19))
    for _ in range(2):  # once is not enough where the head is shared with the embeddings, or its logits are capped
        model.get_output_embeddings().weight *= 2 / plain_logits(model, ids).std()
    logits, others = plain_logits(model, ids), plain_logits(model, [2] + ids[1:])
    assert 1 < logits.std() < 4, f"logits with a standard deviation of {logits.std()}"
    assert (logits[2] - others[2]).abs().max() > 1e-3, "the first token does not matter to the third"


# --- the plainest computation

def plain_logits(model, ids: list[int]):
    """(tokens, V) float32 logits of a row."""
    return model(input_ids=torch.tensor([ids])).logits[0].float()


def plain_logprobs(model, prompt: list[int], completion: list[int], temperature: float = 1.0):
    """Log-prob of each token of the completion, and the entropy there: (2, tokens)."""
    logits = plain_logits(model, prompt + completion)[len(prompt) - 1:-1]
    log_softmax = (logits / temperature).log_softmax(-1)
    return torch.stack([log_softmax[range(len(completion)), completion],
                        -(log_softmax.exp() * log_softmax).sum(-1)])


@torch.no_grad()
def plain_greedy(model, prompt: list[int], tokens: int) -> list[int]:
    """The likeliest token, again and again."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(plain_logits(model, ids)[-1].argmax()))
    return ids[len(prompt):]


# --- checks: each returns its worst difference

# lengths differ in both parts; most rows are longer than the windows of 4 tokens
ROWS = [([5], [20, 21, 22, 23, 24, 1]),
        ([6, 7, 8, 9, 10, 11, 12, 13, 14], [25, 26, 27, 28, 29, 30, 31, 32]),
        ([15, 16, 17, 18, 19, 33, 34, 35, 36, 37, 38, 39, 40, 41], [42, 43, 1])]
SHARED = [(ROWS[1][0], ROWS[0][1]), (ROWS[2][0], ROWS[1][1]), (ROWS[1][0], ROWS[2][1]), (ROWS[2][0], ROWS[0][1])]
TEMPERATURE = 0.7


def batch(rows):
    prompts, completions = zip(*rows)
    return *common.pad(prompts, "left"), *common.pad(completions, "right")


def difference(model, plain, rows) -> float:
    """Between completion_logprobs of a batch of rows, and each row's plain log-probs and entropies."""
    ours, worst = torch.stack(common.completion_logprobs(model, *batch(rows), TEMPERATURE)), 0.0
    for i, (prompt, completion) in enumerate(rows):
        expected = plain_logprobs(plain, prompt, completion, TEMPERATURE)
        error = (ours[:, i, :len(completion)] - expected).abs().max().nan_to_num(torch.inf).item()
        worst = max(worst, error, ours[:, i, len(completion):].abs().sum().item())
    return worst


@torch.no_grad()
def check_critic(model, plain) -> float:
    """The values of ppo.py's critic that starts from the model, in a batch and with shared prompts, against each row
    alone."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        model.save_pretrained(folder)
        if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            plain.whole_config.save_pretrained(folder)
        words = tokenizer(1)
        words.save_pretrained(folder)
        words.embedded = V
        critic = ppo.load_critic(ppo.Args(model=folder, reward="tiny/world.py:gold_reward"), None, words, "cpu").eval()
    torch.nn.init.normal_(critic.score.weight)
    torch.nn.init.normal_(critic.score.bias)
    worst = 0.0
    for rows in (ROWS, SHARED):
        values = ppo.completion_values(critic, *batch(rows))
        for row, (prompt, completion) in zip(values, rows):
            expected = critic(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1:-1, 0]
            worst = max(worst, ((row[:len(completion)] - expected).abs().max() / expected.abs().max()).item())
    return worst


@torch.no_grad()
def check_loaded(model, plain) -> float:
    """Plain logits of the model that was saved and loaded."""
    use_cache(model, False)
    worst = max((plain_logits(model, row) - plain_logits(plain, row)).abs().max().item() for row, _ in ROWS)
    use_cache(model, True)
    return worst


@torch.no_grad()
def check_alone(model, plain) -> float:
    """Each row in a batch of its own."""
    return max(difference(model, plain, [row]) for row in ROWS)


@torch.no_grad()
def check_batch(model, plain) -> float:
    """Rows of different lengths in one batch."""
    return difference(model, plain, ROWS)


@torch.no_grad()
def check_shared(model, plain) -> float:
    """Prompts that several completions have in common."""
    return difference(model, plain, SHARED)


def check_gradients(model, plain) -> float:
    """Gradients of the sum of the log-probs, in train mode as in the scripts; relative to their norm."""
    def gradients(model, logprobs):
        model.zero_grad()
        logprobs.sum().backward()
        return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                          for name, p in sorted(model.named_parameters()) if name in trained])
    worst, trained = 0.0, {name for name, p in plain.named_parameters() if p.requires_grad}
    for rows in (ROWS, SHARED):
        expected = gradients(plain, torch.cat([plain_logprobs(plain, *row, TEMPERATURE)[0] for row in rows]))
        ours = gradients(model, common.completion_logprobs(model.train(), *batch(rows), TEMPERATURE)[0])
        worst = max(worst, ((ours - expected).norm() / expected.norm()).nan_to_num(torch.inf).item())
    model.eval()
    return worst


@torch.no_grad()
def check_greedy(model, plain, sample=grpo.sample, group_size: int = 2, tokens: int = 8) -> float:
    """Sampling so cold that it takes the likeliest token, for prompts of different lengths: how much likelier, in
    logits, the plainly likeliest token is than the one taken. The first prompt's completion ends early."""
    prompts = [ROWS[1][0], ROWS[2][0], ROWS[0][0], *(completion for _, completion in ROWS)]
    end = next((token for token in plain_greedy(plain, prompts[0], 6)[2:] if token > 0), 1)
    run = make_run(grpo.Args(device="cpu", dtype="float32", max_new_tokens=tokens, temperature=1e-3))
    rollout = sample(model, [{"prompt_ids": ids} for ids in prompts], group_size, run, tokenizer(end),
                     torch.Generator().manual_seed(0))
    ends, worst, best = {end, 1}, 0.0, {}
    assert len(rollout.mask) == len(prompts) * group_size
    for i, row in enumerate(rollout.completion_ids):
        prompt, row = prompts[i // group_size], row[rollout.mask[i] == 1].tolist()
        assert (row[-1] in ends or len(row) == tokens) and not ends.intersection(row[:-1])
        assert rollout.prompt_ids[i][rollout.prompt_mask[i] == 1].tolist() == prompt
        for t, token in enumerate(row):
            before = tuple(prompt + row[:t])
            if before not in best:
                best[before] = plain_logits(plain, list(before))[-1]
            worst = max(worst, (best[before].max() - best[before][token]).item())
    return worst


@torch.no_grad()
def check_hot(model, plain, sample=grpo.sample) -> float:
    """Sampling so hot that all tokens are equally likely: which part of the vocabulary never comes first, or second."""
    run = make_run(grpo.Args(device="cpu", dtype="float32", max_new_tokens=2, temperature=1e4))
    rollout = sample(model, [{"prompt_ids": ids} for ids, _ in ROWS[1:]], 200, run, tokenizer(1),
                     torch.Generator().manual_seed(0))
    sampled = [rollout.completion_ids[rollout.mask[:, t] == 1, t] for t in (0, 1)]
    return 1 - min(len(tokens.unique()) for tokens in sampled) / V


def tokenizer(end: int):
    """One that has a word for each token, and one that ends a completion."""
    words = ["<unk>", *(f"<{i}>" if i == end else f"w{i}" for i in range(1, V))]
    return word_tokenizer(words, eos_token=f"<{end}>", pad_token=f"<{end}>")


EXCEPTIONS = {("phimoe", "gradients"): "in train mode its router has a gradient of its own (SparseMixer)"}
CHECKS = {"loaded": (check_loaded, 1e-4), "alone": (check_alone, 1e-4), "batch": (check_batch, 1e-4),
          "shared": (check_shared, 1e-4), "gradients": (check_gradients, 1e-3), "greedy": (check_greedy, 0.02),
          "hot": (check_hot, 0.06), "critic": (check_critic, 1e-4)}


@torch.no_grad()
def not_causal(plain) -> float:
    """How much tokens change the logits of those before them: 0 for a language model, or else there is no truth to
    compare with, and the only right answer is a UserError. The row is so short that no rope is stretched for it."""
    ids = ROWS[2][0][:7]
    logits = plain_logits(plain, ids)
    return max((plain_logits(plain, ids[:n]) - logits[:n]).abs().max().item() for n in range(1, 8))


def verdicts(name: str) -> dict:
    """What each check of a family came to: "ok 1e-07", "WRONG 3e-01", "refused: ..." (a UserError), "RAISED ..."."""
    def verdict(call, tolerance):
        try:
            worst = call()
        except modeling.UserError as error:
            return f"refused: {error}"
        except Exception as error:
            return f"RAISED {type(error).__name__}: {modeling.first_line(error)}"
        return f"{'ok' if worst < tolerance else 'WRONG'} {worst:.0e}"
    plain, models = tiny_model(name), []
    loading = verdict(lambda: models.append(load(plain)) or 0, 1)
    if not models:
        return {"loaded": loading}
    if (limit := modeling.context_length(models[0])) < max(len(a + b) for a, b in ROWS):
        return {"loaded": loading, "rows": f"refused: they are longer than the context of {limit}"}
    found = {check: verdict(lambda: function(*models, plain), tolerance)
             for check, (function, tolerance) in CHECKS.items() if (name, check) not in EXCEPTIONS}
    if not_causal(plain) > 1e-3:
        found = {check: text if text.startswith(("refused", "RAISED")) else "WRONG: not causal"
                 for check, text in found.items() if check != "loaded"}
    return found
