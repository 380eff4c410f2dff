"""How the three on-policy scripts sample: their `generate` and `sample` are the same to the letter (tests/repo holds
them to that), so some of this is tested in one of them."""
import math

import pytest
import torch
import transformers

import common
import modeling
import grpo
import ppo
import reinforce
from helpers.unit import EOS, gpt2, llama, make_run, qwen2, refuses

SCRIPTS = {"grpo": grpo, "ppo": ppo, "reinforce": reinforce}


@pytest.fixture(scope="module")
def policy():
    return modeling.load_causal_lm("tiny/policy", "cpu").eval()


def encoded(tokenizer, *prompts):
    return common.encode(tokenizer, [common.render(tokenizer, prompt) for prompt in prompts])


@pytest.mark.parametrize("script", SCRIPTS)
def test_generate_stops_at_each_end(script, policy, tokenizer):
    """Rows of a group differ, and the mask ends with the first end of sequence."""
    prompts = encoded(tokenizer, "what is the capital of france ?", "how do i make tea ?")
    end = tokenizer.eos_token_id
    ids, mask, _ = SCRIPTS[script].generate(policy, *common.pad(prompts, "left", pad_id=tokenizer.pad_token_id), 200, 20,
                                         1.3, torch.tensor([end]), torch.Generator().manual_seed(0))
    assert ids.shape == mask.shape == (400, 20) and len(set(map(tuple, ids.tolist()))) > 100
    for row, row_mask in zip(ids, mask):
        n = int(row_mask.sum())
        assert row_mask[:n].all() and not (row[:n - 1] == end).any()
        assert n == 20 or row[n - 1] == end


def test_drawn_tokens_have_their_probabilities():
    """By a chi-squared test, 7 degrees of freedom; a token of probability 0 is never drawn, also not the first or the
    last; rows are independent; without a generator, the likeliest."""
    row = torch.tensor([0.0, 0.3, 0.2, 1e-3, 0.0, 0.1, 0.25, 0.099, 0.04, 0.01, 0.0])
    probs = row.expand(100_000, -1)
    tokens = common.draw(probs, torch.Generator().manual_seed(0))
    assert tokens.shape == (100_000, 1)
    found, expected = tokens[:, 0].bincount(minlength=len(row)), 1e5 * row
    assert (found[row == 0] == 0).all()
    assert ((found - expected)[row > 0].square() / expected[row > 0]).sum() < 24.3  # exceeded once in 1,000
    pairs = (tokens[::2, 0] == 1) & (tokens[1::2, 0] == 1)
    assert pairs.double().mean().item() == pytest.approx(0.09, abs=0.006)
    assert common.draw(probs[:2]).tolist() == [[1], [1]]
    assert torch.equal(tokens, common.draw(probs, torch.Generator().manual_seed(0)))


def test_probabilities_that_are_not_finite_are_named():
    for bad in (math.nan, math.inf):
        probs = torch.tensor([[0.5, 0.5], [bad, 0.5]])
        refuses(lambda: common.draw(probs, torch.Generator()), "probabilities are not finite", "lower --lr")


def test_generate_samples_what_the_forward_pass_says(policy, tokenizer):
    """The frequency of each first token is its probability in a plain forward pass of the prompt (no other token's, no
    shared draw)."""
    prompts = encoded(tokenizer, "what is the capital of france ?", "how do i make tea ?")
    ids, mask, _ = grpo.generate(policy, *common.pad(prompts, "left"), 3000, 5, 1.3,
                              torch.tensor([tokenizer.eos_token_id]), torch.Generator().manual_seed(0))
    assert len(set(map(tuple, ids.tolist()))) > 300
    for i, prompt in enumerate(prompts):
        probs = (policy(torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(-1)
        first = ids[i * 3000:(i + 1) * 3000, 0].bincount(minlength=len(probs)) / 3000
        assert (first - probs).abs().sum() / 2 < 0.08
    # the second token too: rows keep their cache when others finish
    likely = ids[:3000, 0].mode().values
    after = ids[:3000][(ids[:3000, 0] == likely) & (mask[:3000, 1] == 1), 1]
    probs = (policy(torch.tensor([prompts[0] + [likely.item()]])).logits[0, -1] / 1.3).softmax(-1)
    assert (after.bincount(minlength=len(probs)) / len(after) - probs).abs().sum() / 2 < 0.08


@pytest.mark.parametrize("make", [llama, gpt2, qwen2])
def test_each_decoding_step_agrees_with_the_forward_pass(make, monkeypatch):
    """The probabilities of every step, through the shared and shrinking cache, at the sampling temperature; a
    finished row is no longer computed, and a second end-of-sequence token ends one as well."""
    model = make().eval()
    steps = []

    def spy(probs, generator):
        steps.append((probs, common.draw(probs, generator)))
        return steps[-1][1]
    monkeypatch.setattr(grpo, "draw", spy)
    prompt_ids, prompt_mask = common.pad([[5, 6, 7], [9], [10, 11, 12, 13, 14]], "left")
    eos_ids = torch.tensor([EOS, 7, 8, 9])
    ids, mask, _ = grpo.generate(model, prompt_ids, prompt_mask, 4, 16, 0.7, eos_ids, torch.Generator().manual_seed(1))
    repeated = prompt_ids.repeat_interleave(4, 0), prompt_mask.repeat_interleave(4, 0)
    logprobs, _ = common.completion_logprobs(model, *repeated, ids, mask, 0.7)
    for t, (probs, token) in enumerate(steps):
        rows = mask[:, t] == 1
        assert len(probs) == rows.sum() and torch.equal(token[:, 0], ids[rows, t])
        torch.testing.assert_close(probs.gather(1, token).log()[:, 0], logprobs[rows, t].detach(), atol=1e-4, rtol=0)
    assert len(steps[-1][0]) < 12 and torch.isin(ids[mask == 1], torch.tensor([7, 8, 9])).any()


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_generator_it_takes_the_likeliest_token(script, policy, tokenizer):
    """Each token is the argmax of a plain forward pass."""
    prompts = encoded(tokenizer, "what is the capital of france ?", "how do i make tea ?")
    ids, mask, _ = SCRIPTS[script].generate(policy, *common.pad(prompts, "left"), 1, 8, 0.7,
                                         torch.tensor([tokenizer.eos_token_id]))
    for prompt, row, row_mask in zip(prompts, ids.tolist(), mask.tolist()):
        for t in range(sum(row_mask)):
            assert policy(torch.tensor([prompt + row[:t]])).logits[0, -1].argmax() == row[t]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_sample_is_a_rollout_of_groups(script, policy, tokenizer):
    """group_size completions per row in the order of the rows, in batches that fit --generate-batch-size, with columns
    for the longest one only; the model is put in eval mode."""
    module = SCRIPTS[script]
    rows = [{"prompt_ids": ids} for ids in encoded(tokenizer, "a ?", "what is the capital of france ?", "is it ?")]
    sizes, generate = [], module.generate

    def spy(model, prompt_ids, *rest):
        sizes.append(len(prompt_ids))
        return generate(model, prompt_ids, *rest)
    for batch_size, expected in ((8, [2, 1]), (3, [1, 1, 1]), (512, [3])):
        run = make_run(module.Args(device="cpu", generate_batch_size=batch_size, max_new_tokens=12))
        sizes.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "generate", spy)
            rollout = module.sample(policy.train(), rows, 4, run, tokenizer, run.generator(1))
        assert sizes == expected and not policy.training
        assert len(rollout.texts) == 12 and rollout.mask.shape[1] == rollout.mask.sum(1).max() <= 12
        for i, (ids, mask) in enumerate(zip(rollout.prompt_ids, rollout.prompt_mask)):
            assert ids[mask == 1].tolist() == rows[i // 4]["prompt_ids"]
        last = rollout.completion_ids.gather(1, rollout.mask.sum(1, keepdim=True) - 1)[:, 0]
        assert torch.equal(rollout.truncated, last != tokenizer.eos_token_id)
        assert "<|end|>" not in "".join(rollout.texts)


@pytest.mark.parametrize("make", [llama, gpt2, qwen2])
def test_the_cache_is_kept_in_autocasts_precision_and_changes_no_token(make, monkeypatch):
    """In bfloat16 half the memory; drawn tokens are those of transformers' own cache. In float32 it is that one."""
    model, batch = make().eval(), common.pad([[18, 19, 20], [21, 22]], "left")
    drawn, caches, own = {}, [], modeling.SamplingCache

    def kept(config):
        caches.append(own(config=config))
        return caches[-1]
    for bf16 in (True, False):
        for cache in (kept, transformers.DynamicCache):
            monkeypatch.setattr(modeling, "SamplingCache", cache)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                drawn[bf16, cache] = grpo.generate(model, *batch, 20, 12, 1.0, torch.tensor([EOS]),
                                                   torch.Generator().manual_seed(0))[0]
        assert torch.equal(drawn[bf16, kept], drawn[bf16, transformers.DynamicCache])
        assert caches[-1].layers[0].keys.dtype == caches[-1].layers[1].values.dtype == (
            torch.bfloat16 if bf16 else torch.float32)
