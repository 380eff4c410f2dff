"""REINFORCE, PPO and DPO in the world of test_grpo_exact.py: 4 tokens, at most 3 steps, token
0 ends. All 40 completions are listed: gradients, their variance and training's end are exact
sums.

The tables (the gradient's angles and variances, how far each variant ends from
pi_ref * exp(r / beta) / Z) are printed by `python -m pytest -n 0 -s tests/test_exact.py`.
"""
import pytest
import torch

import ppo
import reinforce
from common import kl_estimate, masked_mean, masked_whiten
from dpo import dpo_loss
from test_grpo_exact import BETA, World, distance, exact_gradient, some_policy

CLIP, NO_CLIP = (0.2, 0.2), (1e9, 1e9)
BASELINES = ["none", "mean", "moving", "loo", "greedy"]


def a_world():
    return World(3, end=True, seed=3)  # whose optimum is not nearly one completion


@pytest.fixture(scope="module")
def world():
    return a_world()


def groups(values, size: int = 2):
    """(Y, ...) -> (Y ** size, size, ...): every group of completions."""
    numbers = torch.cartesian_prod(*[torch.arange(len(values))] * size)
    return values[numbers.view(-1, size)]


def flat(values):
    return values.flatten(0, 1)


def turned(gradient, exact):
    """The angle in degrees."""
    cosine = torch.cosine_similarity(gradient.flatten(), exact.flatten(), 0)
    return cosine.clamp(max=1).acos().rad2deg().item()


def greedy_score(world, table):
    likeliest = (world.ids == table.argmax(-1)[world.row]) | (world.mask == 0)
    score, = world.rewards[likeliest.all(1)]  # of one completion
    return score


def whitened(A, p, mask):
    """In the limit of large rollouts: each token counts by its probability."""
    return masked_whiten(A, p[:, None] * mask) / p[:, None]


# --- REINFORCE: the gradient

def reinforce_rewards(world, old, kl_in: str):
    return world.rewards_less_kl(old) if kl_in == "completion" else world.rewards


def reinforce_advantages(world, table, baseline: str, kl_in: str, size: int, moving: float):
    """Of every group of completions, (Y ** size * size, T)."""
    old = world.logprobs(table)
    rewards = flat(groups(reinforce_rewards(world, old, kl_in), size))
    greedy = greedy_score(world, table).expand_as(rewards)
    b = reinforce.baseline_of(rewards, size, baseline, moving, greedy)
    kl = flat(groups(kl_estimate(old, world.ref_logprobs), size))
    mask = flat(groups(world.mask, size))
    return reinforce.token_advantages(rewards, b, kl, mask, BETA, kl_in, False)


def reinforce_gradient(world, table, baseline: str, kl_in: str, size: int):
    """Of the loss at ratio 1, over all groups of completions, with some moving baseline."""
    A = reinforce_advantages(world, table, baseline, kl_in, size, moving=0.7)
    table = table.clone().requires_grad_()
    logprobs = world.logprobs(table)
    p = groups(logprobs.detach().sum(1).exp(), size).prod(1)
    new, mask = flat(groups(logprobs, size)), flat(groups(world.mask, size))
    loss, _, _ = reinforce.policy_loss(new, new.detach(), A, mask, *CLIP)
    loss = loss.sum(1).view(-1, size).mean(1)
    return torch.autograd.grad((p * loss).sum(), table)[0]


@pytest.mark.parametrize("kl_in", ["completion", "token"])
@pytest.mark.parametrize("baseline", ["none", "loo", "moving", "greedy"])
def test_reinforce_s_gradient_is_exact(world, baseline, kl_in):
    table = some_policy(world)
    for size in (2, 3):
        gradient = reinforce_gradient(world, table, baseline, kl_in, size)
        torch.testing.assert_close(gradient, -exact_gradient(world, table), rtol=0, atol=1e-10)


def test_the_mean_shrinks_the_gradient(world):
    # by (G - 1) / G what the mean is taken of: with --kl-in token the reward alone, and not
    # the KL, so that beta counts for G / (G - 1) of itself
    table = some_policy(world)
    exact = exact_gradient(world, table)
    no_reward = a_world()
    no_reward.rewards = torch.zeros_like(world.rewards)
    kl = exact_gradient(no_reward, table)
    for size in (2, 3):
        shrunk = (size - 1) / size
        gradient = reinforce_gradient(world, table, "mean", "completion", size)
        torch.testing.assert_close(gradient, -shrunk * exact, rtol=0, atol=1e-10)
        gradient = reinforce_gradient(world, table, "mean", "token", size)
        torch.testing.assert_close(gradient, -shrunk * (exact - kl) - kl, rtol=0, atol=1e-10)


def test_what_an_older_policy_sampled_is_weighted_by_the_ratio(world):
    # the second update and on, unclipped: the gradient of the rollout's rewards' mean
    old, table = world.ref_logprobs, some_policy(world).requires_grad_()
    logprobs = world.logprobs(table)
    A = world.rewards[:, None] * world.mask
    loss, _, _ = reinforce.policy_loss(logprobs, old, A, world.mask, *NO_CLIP)
    gradient, exact = (torch.autograd.grad(x, table, retain_graph=True)[0] for x in (
        old.sum(1).exp() @ loss.sum(1), -logprobs.sum(1).exp() @ world.rewards))
    torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("script", [reinforce, ppo])
def test_the_clip_stops_what_would_go_further_out(world, script):
    # the ratio is a completion's in reinforce.py, a token's in ppo.py
    old, new = world.ref_logprobs, world.logprobs(some_policy(world)).requires_grad_()
    A = torch.randn(new.shape, generator=torch.Generator().manual_seed(4)).double()
    mask = (world.mask,) if script is reinforce else ()
    loss, low, high = script.policy_loss(new, old, A, *mask, 0.2, 0.3)
    gradient = torch.autograd.grad((loss * world.mask).sum(), new)[0]
    ratio = (new - old).detach()
    ratio = (ratio.sum(1, keepdim=True).expand_as(ratio) if mask else ratio).exp()
    for y, t in world.mask.nonzero().tolist():
        r, a = ratio[y, t].item(), A[y, t].item()
        assert (low[y, t].item(), high[y, t].item()) == (r < 0.8 and a < 0, r > 1.3 and a > 0)
        stopped = low[y, t] or high[y, t]
        assert gradient[y, t].item() == pytest.approx(0 if stopped else -r * a, abs=1e-12)


# --- REINFORCE: the variance

def variance(world, table, baseline: str, kl_in: str):
    """(variance, squared length of the mean) of the gradient that a group of 2 gives."""
    old = world.logprobs(table)
    p = old.sum(1).exp()
    mean = (p @ reinforce_rewards(world, old, kl_in)).item()
    A = reinforce_advantages(world, table, baseline, kl_in, 2, mean)
    new, mask = flat(groups(old)).requires_grad_(), flat(groups(world.mask))
    loss, _, _ = reinforce.policy_loss(new, new.detach(), A, mask, *CLIP)
    by_token = torch.autograd.grad(loss.sum() / 2, new)[0].view(len(p) ** 2, -1)  # (YY, 2 T)
    of_table = torch.autograd.functional.jacobian(world.logprobs, table)  # (Y, T, rows, 4)
    g = torch.einsum("gk,gkd->gd", by_token, groups(of_table.flatten(2)).flatten(1, 2))
    pp = groups(p).prod(1)
    expected = pp @ g
    return (pp @ (g - expected).square().sum(1)).item(), expected.square().sum().item()


@pytest.fixture(scope="module")
def variances():
    """{(KL in, added to all rewards): {baseline: (variance, squared mean)}}"""
    table, found = some_policy(a_world()), {}
    for kl_in in ("completion", "token"):
        for offset in (0, 3):
            world = a_world()
            world.rewards += offset
            found[kl_in, offset] = {b: variance(world, table, b, kl_in) for b in BASELINES}
    print("\nvariance of the gradient from a group of 2, over its mean's squared length")
    print(f"{'baseline':10}" + "".join(f"{f'{kl_in}, r + {c}':>19}" for kl_in, c in found))
    for b in BASELINES:
        print(f"{b:10}" + "".join(f"{v / m:19.1f}" for v, m in (d[b] for d in found.values())))
    return found


@pytest.mark.parametrize("kl_in", ["completion", "token"])
def test_the_baselines_variances(variances, kl_in):
    with_0, with_3 = variances[kl_in, 0], variances[kl_in, 3]
    for b in BASELINES[1:]:  # what all rewards have in common is taken off
        assert with_3[b][0] == pytest.approx(with_0[b][0], rel=1e-9)
        assert with_3[b][0] < with_3["none"][0]
    for v in (with_0, with_3):
        # the others' mean has a variance of its own, and the policy's mean has none: if A is
        # R - E[R], loo adds -(A_2 s_1 + A_1 s_2) / 2, uncorrelated (s: grad log pi)
        assert v["moving"][0] < v["loo"][0]


def test_the_mean_s_noise_is_loo_s(variances):
    # of 2, R - mean is half of R - the other's: no less noise beside the smaller gradient
    for v in (variances["completion", 0], variances["completion", 3]):
        assert v["mean"][0] == pytest.approx(v["loo"][0] / 4, rel=1e-9)
        assert v["mean"][1] == pytest.approx(v["loo"][1] / 4, rel=1e-9)


# --- PPO: generalised advantage estimation

@pytest.mark.parametrize("gamma, lam", [(1, 1), (1, 0.95), (0.9, 1), (0.97, 0.8), (0.9, 0),
                                        (0, 0.5)])
def test_gae_is_its_double_sum(gamma, lam):
    generator = torch.Generator().manual_seed(3)
    B, T = 32, 9
    rewards, values = torch.randn(2, B, T, generator=generator, dtype=torch.float64)
    lengths = torch.randint(T + 1, (B,), generator=generator)
    lengths[:3] = torch.tensor([0, 1, T])
    mask = (torch.arange(T) < lengths[:, None]).long()  # beyond it, numbers not to count
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for b, length in enumerate(lengths.tolist()):
        V = values[b, :length].tolist() + [0]
        delta = [rewards[b, t].item() + gamma * V[t + 1] - V[t] for t in range(length)]
        for t in range(T):
            A = sum((gamma * lam) ** l * delta[t + l] for l in range(length - t))
            R = A + V[t] if t < length else 0
            assert advantages[b, t].item() == pytest.approx(A, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(R, abs=1e-12)


# --- PPO: the gradient

def ppo_rewards(world, old):
    kl = kl_estimate(old, world.ref_logprobs)
    return ppo.token_rewards(world.rewards, kl, world.mask.long(), BETA)


def exact_critic(world, old):
    """(Y, T) the mean of what is still to come, over all completions with this beginning."""
    to_come = (ppo_rewards(world, old) * world.mask).flip(1).cumsum(1).flip(1)
    p, rows = old.sum(1).exp()[:, None] * world.mask, world.row.flatten()
    total, share = (torch.zeros(len(world.ref), dtype=torch.float64).index_add(
        0, rows, x.flatten()) for x in (p * to_come, p))
    return (total / share.clamp(min=1e-300))[world.row] * world.mask


def ppo_advantages(world, old, lam: float = 1.0, critic=exact_critic):
    return ppo.gae(ppo_rewards(world, old), critic(world, old), world.mask, 1.0, lam)[0]


def wrong_critic(world, old):
    noise = torch.randn(world.ref.shape[0], generator=torch.Generator().manual_seed(2))
    return exact_critic(world, old) + noise.double()[world.row] * world.mask


def ppo_gradient(world, table, A):
    """Of the loss at ratio 1, summed over tokens; A (Y, T)."""
    table = table.clone().requires_grad_()
    logprobs = world.logprobs(table)
    loss, _, _ = ppo.policy_loss(logprobs, logprobs.detach(), A, *CLIP)
    p = logprobs.detach().sum(1).exp()
    return torch.autograd.grad(p @ (loss * world.mask).sum(1), table)[0]


def ppo_gradient_of_rollouts(world, table, size: int, whiten: bool):
    """Of the loss as it is, a mean over tokens: over all rollouts of `size` completions."""
    table = table.clone().requires_grad_()
    logprobs = world.logprobs(table)
    p, mask = groups(logprobs.detach().sum(1).exp(), size).prod(1), groups(world.mask, size)
    A = groups(ppo_advantages(world, logprobs.detach()), size)
    A = torch.vmap(masked_whiten)(A, mask) if whiten else A
    new = groups(logprobs, size)
    loss, _, _ = ppo.policy_loss(new, new.detach(), A, *CLIP)
    return torch.autograd.grad(p @ torch.vmap(masked_mean)(loss, mask), table)[0]


@pytest.mark.parametrize("lam, critic", [(1.0, exact_critic), (1.0, wrong_critic),
                                         (0.95, exact_critic), (0.0, exact_critic)])
def test_ppo_s_gradient_is_exact(world, lam, critic):
    # lambda 1 asks nothing of the critic, and an exact critic nothing of lambda
    table = some_policy(world)
    A = ppo_advantages(world, world.logprobs(table), lam, critic)
    gradient = ppo_gradient(world, table, A)
    torch.testing.assert_close(gradient, -exact_gradient(world, table), rtol=0, atol=1e-10)


def test_an_exact_critic_s_advantages_have_no_mean(world):
    # after every beginning: what makes the critic of these tests exact
    old = world.logprobs(some_policy(world))
    p = old.sum(1).exp()[:, None] * world.mask
    sums = torch.zeros(len(world.ref), dtype=torch.float64).index_add(
        0, world.row.flatten(), (p * ppo_advantages(world, old)).flatten())
    assert sums.abs().max() < 1e-12


def test_what_turns_ppo_s_gradient(world):
    table = some_policy(world)
    old, exact = world.logprobs(table), -exact_gradient(world, table)
    p = old.sum(1).exp()
    degrees = {f"{'whitened, ' if whiten else ''}mean over tokens, rollouts of {size}":
               turned(ppo_gradient_of_rollouts(world, table, size, whiten), exact)
               for whiten in (False, True) for size in (2, 3)}
    # the limit of large rollouts: each token counts by its probability, the mean over them is
    # one number, and neither turns anything
    A = whitened(ppo_advantages(world, old), p, world.mask)
    large = ppo_gradient(world, table, A) / (p @ world.mask.sum(1))
    degrees["whitened, mean over tokens, large rollouts"] = turned(large, exact)
    for lam in (0.95, 0.0):
        A = ppo_advantages(world, old, lam, wrong_critic)
        gradient = ppo_gradient(world, table, A)
        degrees[f"a critic off by 1, lambda {lam:g}"] = turned(gradient, exact)
    print("\ndegrees off the gradient")
    for name, angle in degrees.items():
        print(f"{name:45}{angle:6.2f}")
    plain2, plain3, white2, white3, limit, lam_95, lam_0 = degrees.values()
    assert limit < 1e-5
    assert 0.1 < plain3 < plain2 and 0.1 < white3 < white2  # the less the larger the rollout
    assert 0.1 < lam_95 < lam_0


def test_a_token_s_probability_as_its_mask_is_many_of_it():
    torch.manual_seed(0)
    counts, A = torch.randint(1, 9, (20, 1)), torch.randn(20, 3, dtype=torch.float64)
    mask = torch.arange(3) < torch.randint(1, 4, (20, 1))
    many = masked_whiten(*(x.repeat_interleave(counts[:, 0], 0) for x in (A, mask)))
    weighted = (masked_whiten(A, counts * mask) / counts).repeat_interleave(counts[:, 0], 0)
    torch.testing.assert_close(many, weighted, rtol=1e-12, atol=1e-12)


# --- where training ends

def train(world, loss, updates: int = 1):
    """The policy (Y,) at the end of exact expected updates, begun at the reference, and
    whether the clip ever stopped a token. The critic, a value a beginning, begins at 0."""
    table, critic = world.ref.clone(), torch.zeros(len(world.ref), dtype=torch.float64)
    tables = [table.requires_grad_(), critic.requires_grad_()]
    optimizer = torch.optim.Adam(tables, lr=0.1)
    rollouts = 300 if updates == 1 else 150
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rollouts)
    ever = False
    for _ in range(rollouts):
        old, old_values = world.logprobs(table).detach(), values_of(world, critic).detach()
        for _ in range(updates):
            optimizer.zero_grad()
            logprobs, values = world.logprobs(table), values_of(world, critic)
            total, stopped = loss(world, logprobs, old, values, old_values)
            total.backward()
            optimizer.step()
            ever |= stopped
        schedule.step()
    return world.logprobs(table.detach()).sum(1).exp(), ever


def values_of(world, critic):
    return critic[world.row] * world.mask


def reinforce_loss(kl_in: str, clip=NO_CLIP):
    """With loo over all groups of 2: the loss of the first of each."""
    def loss(world, logprobs, old, *_):
        pp, kl = groups(old.sum(1).exp()).prod(1), kl_estimate(old, world.ref_logprobs)
        rewards = groups(reinforce_rewards(world, old, kl_in))  # (YY, 2)
        b = reinforce.baseline_of(rewards.flatten(), 2, "loo").view(-1, 2)
        new, old, kl, mask = (groups(x)[:, 0] for x in (logprobs, old, kl, world.mask))
        A = reinforce.token_advantages(rewards[:, 0], b[:, 0], kl, mask, BETA, kl_in, False)
        per_token, low, high = reinforce.policy_loss(new, old, A, mask, *clip)
        return pp @ per_token.sum(1), (low | high).any().item()
    return loss


def reinforce_plus_plus_loss(clip):
    def loss(world, logprobs, old, *_):
        p, kl = old.sum(1).exp(), kl_estimate(old, world.ref_logprobs)
        b = reinforce.baseline_of(world.rewards, 1, "none")
        A = reinforce.token_advantages(world.rewards, b, kl, world.mask, BETA, "token", False)
        A = whitened(A, p, world.mask)
        per_token, low, high = reinforce.policy_loss(logprobs, old, A, world.mask, *clip)
        return p @ per_token.sum(1), (low | high).any().item()
    return loss


def ppo_loss(clip=NO_CLIP, lam: float = 1.0, whiten: bool = False, learned: bool = False):
    def loss(world, logprobs, old, values, old_values):
        p = old.sum(1).exp()
        weights = p[:, None] * world.mask
        critic_values = old_values if learned else exact_critic(world, old)
        A, returns = ppo.gae(ppo_rewards(world, old), critic_values, world.mask, 1.0, lam)
        A = whitened(A, p, world.mask) if whiten else A
        per_token, low, high = ppo.policy_loss(logprobs, old, A, *clip)
        if learned:
            per_token = per_token + ppo.value_loss(values, old_values, returns, 0.2)
        return masked_mean(per_token, weights), (low | high).any().item()
    return loss


def dpo_loss_of_pairs(loss_type: str, flipped: float = 0.0, **kwargs):
    """Over all pairs, drawn from the reference, labelled by Bradley and Terry with the true
    reward, of which labels a share is flipped."""
    def loss(world, logprobs, *_):
        both = (groups(x.sum(1)) for x in (logprobs, world.ref_logprobs))
        answers = [x[:, i] for x in both for i in (0, 1)]
        r, ref = groups(world.rewards), groups(world.ref_logprobs.sum(1).exp())
        won = (r[:, 0] - r[:, 1]).sigmoid()
        won = won + flipped * (1 - 2 * won)
        return (ref.prod(1) * won) @ dpo_loss(*answers, BETA, loss_type, **kwargs), False
    return loss


CLOSE, FAR = (0, 0.02), (0.1, 1)
VARIANTS = {  # the loss, updates a rollout (2 x 2: epochs, minibatches), the distance's bounds
    "REINFORCE, loo": (reinforce_loss("completion"), 1, CLOSE),
    "REINFORCE, loo, KL in token": (reinforce_loss("token"), 1, CLOSE),
    "REINFORCE, loo, 2 x 2, clipped": (reinforce_loss("completion", CLIP), 4, CLOSE),
    "REINFORCE++, 2 x 2, clipped": (reinforce_plus_plus_loss(CLIP), 4, CLOSE),
    "PPO, exact critic": (ppo_loss(), 1, CLOSE),
    "PPO, exact critic, 2 x 2, clipped": (ppo_loss(CLIP), 4, CLOSE),
    "the same, whitened, lambda 0.95": (ppo_loss(CLIP, 0.95, True), 4, CLOSE),
    "the same, and the critic learned": (ppo_loss(CLIP, 0.95, True, True), 4, CLOSE),
    "DPO": (dpo_loss_of_pairs("sigmoid"), 1, CLOSE),
    "DPO, a fifth of labels flipped": (dpo_loss_of_pairs("sigmoid", 0.2), 1, FAR),
    "the same, robust": (
        dpo_loss_of_pairs("sigmoid", 0.2, label_smoothing=0.2, robust=True), 1, CLOSE),
    "IPO": (dpo_loss_of_pairs("ipo"), 1, FAR),
    "hinge": (dpo_loss_of_pairs("hinge"), 1, FAR),
}


@pytest.fixture(scope="module")
def ends():
    world = a_world()
    optimum, ref = world.optimum(), world.ref_logprobs.sum(1).exp()
    ends = {name: train(world, loss, updates) for name, (loss, updates, _) in VARIANTS.items()}
    print(f"\n{'distance from the optimum':36}{'E[r]':>7}{'KL':>7}")
    table = {"(the reference)": ref, "(the optimum)": optimum}
    for name, p in (table | {name: p for name, (p, _) in ends.items()}).items():
        kl = p @ (p / ref).log()
        print(f"{name:36}{p @ world.rewards:7.3f}{kl:7.3f}{distance(p, optimum):9.4f}")
    return ends


@pytest.mark.parametrize("name", VARIANTS)
def test_where_it_converges(world, ends, name):
    _, updates, (low, high) = VARIANTS[name]
    p, stopped = ends[name]
    assert low <= distance(p, world.optimum()) <= high
    assert stopped == (updates > 1)  # where there is a clip, it was at work


def test_the_optimum_is_neither_the_reference_nor_one_completion(world):
    assert distance(world.ref_logprobs.sum(1).exp(), world.optimum()) > 0.4
    assert world.optimum().max() < 0.25


def test_ipo_s_optimum(world, ends):
    # arXiv:2310.12036, theorem 1: the chance of being chosen over one of the reference's
    # answers has the reward's place
    ref = world.ref_logprobs.sum(1)
    chance = (world.rewards[:, None] - world.rewards).sigmoid() @ ref.exp()
    assert distance(ends["IPO"][0], (ref + chance / BETA).softmax(0)) < 0.001
