"""Published formulas for making a model's MLPs smaller, each in a few lines.

    peer(model, ids_NL, keep)

changes a dense model in place so that at most a share `keep` of its MLP parameters is left. They
are the formulas as their papers give them, for the MLPs alone, without the papers' own code.

- With the statistics of the dense model: `mean_activation`, `flap`, `whitened_svd`, `shortgpt`.
- Layer after layer, on the inputs that the layers pruned before produce: `wanda_sp`, `osscar`,
  `modegpt`.

A neuron is one input of the down projection, with the rows of the gate and up projections that
make it. What the papers do to attention is left out.

Shapes: N windows of L tokens, T = tokens, M = neurons, K = neurons kept, D = hidden size,
I = in_features, O = out_features, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import mlp_parameters
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from llmslim import fitting, planning
from llmslim.anatomy.layer_calls import record_calls, run_layer
from llmslim.anatomy.sites import Mlp, dense_weight, find_layers, find_mlps
from llmslim.editing.resize import keep_neurons
from llmslim.init import GramAccumulator, low_rank_factors
from llmslim.modeling.low_rank import LowRank
from llmslim.modeling.modeling_llmslim import set_module
from llmslim.modeling.sizes import exact_ratio
from llmslim.recipe import Recipe

RIDGE = 1e-2
"""Ridge of `osscar` and `modegpt`, in units of the neurons' mean power."""

Peer = Callable[[Any, Tensor, float], None]


@torch.no_grad()
def mean_activation(model: Any, ids_NL: Tensor, keep: float) -> None:
    """Keep the neurons of the largest mean |activation|; nothing is fitted again.

    Minitron (Muralidharan et al. 2024, arXiv:2407.14679, section 2.2), aggregated by the mean over
    windows and tokens; here of what the down projection reads, since a gated MLP's neuron is the
    product of two projections.
    """
    mlps = find_mlps(model, find_layers(model))
    total_M = [torch.zeros(mlp.width, dtype=torch.float64, device=model.device) for mlp in mlps]

    def add(index: int, x_TM: Tensor) -> None:
        total_M[index] += x_TM.abs().sum(0, dtype=torch.float64)

    read_inputs(model, [mlp.down for mlp in mlps], ids_NL, add)
    for mlp, score_M in zip(mlps, total_M, strict=True):
        keep_best(model, mlp, score_M, neurons_kept(mlp, keep))


def wanda_sp(model: Any, ids_NL: Tensor, keep: float) -> None:
    """Keep the neurons of the largest |weight| times activation norm; nothing is fitted again.

    Wanda (Sun et al. 2023, arXiv:2306.11695, equation 1) summed over the outputs of the down
    projection, the structured baseline of FLAP's paper (arXiv:2312.11983).
    """

    def prune(mlp: Mlp, gram_MM: Tensor) -> None:
        score_M = wanda_scores(dense_weight(model.get_submodule(mlp.down)), gram_MM)
        keep_best(model, mlp, score_M, neurons_kept(mlp, keep))

    layer_by_layer(model, ids_NL, prune)


def wanda_scores(down_OM: Tensor, gram_MM: Tensor) -> Tensor:
    """Return sum_o |W_oj| ‖x_j‖, (M,), up to a factor that all neurons share."""
    return down_OM.double().abs().sum(0) * gram_MM.diagonal().sqrt()


@torch.no_grad()
def flap(model: Any, ids_NL: Tensor, keep: float) -> None:
    """Keep the neurons that fluctuate most; a bias stands in for the others' means.

    FLAP (An et al. 2024, arXiv:2312.11983): the metric WIFV, var(x_j) ‖W_:j‖², standardised in
    each layer and cut at one threshold over all of them; the bias is W_:j mean(x_j), summed over
    the neurons that go. Biases are parameters, and paid for with neurons. Every layer keeps a
    neuron at least.
    """
    mlps = find_mlps(model, find_layers(model))
    moments = [torch.zeros(2, mlp.width, dtype=torch.float64, device=model.device) for mlp in mlps]

    def add(index: int, x_TM: Tensor) -> None:
        moments[index] += torch.stack((x_TM.double().sum(0), x_TM.double().square().sum(0)))

    read_inputs(model, [mlp.down for mlp in mlps], ids_NL, add)
    tokens, scores, means = ids_NL.numel(), [], []
    for mlp, (sum_M, square_M) in zip(mlps, moments, strict=True):
        means.append(sum_M / tokens)
        variance_M = (square_M - sum_M * means[-1]).clamp_min(0) / (tokens - 1)
        power_M = dense_weight(model.get_submodule(mlp.down)).double().square().sum(0)
        scores.append(variance_M * power_M)
    for mlp, kept_K, mean_M in zip(
        mlps, flap_choice(model, mlps, scores, keep), means, strict=True
    ):
        down: Any = model.get_submodule(mlp.down)
        down_OM = dense_weight(down)
        gone_M = torch.ones(mlp.width, dtype=torch.bool, device=down_OM.device)
        gone_M[kept_K] = False
        keep_neurons(model, mlp, kept_K, down_OM[:, kept_K])
        if gone_M.any():
            bias_O = (down_OM.double()[:, gone_M] @ mean_M[gone_M]).to(down_OM)
            smaller: Any = model.get_submodule(mlp.down)
            own = smaller.bias
            smaller.bias = nn.Parameter(bias_O if own is None else own.data + bias_O)


def flap_choice(
    model: Any, mlps: Sequence[Mlp], scores: Sequence[Tensor], keep: float
) -> list[Tensor]:
    """Return each MLP's neurons that stay, by one threshold on standardised scores."""
    sizes = [sum(p.numel() for p in model.get_submodule(mlp.name).parameters()) for mlp in mlps]
    each = sizes[0] // mlps[0].width  # parameters of a neuron
    biases = sum(len(dense_weight(model.get_submodule(mlp.down))) for mlp in mlps)
    most = sum(mlp.width for mlp in mlps)
    room = int(sum(sizes) * exact_ratio(keep)) - biases
    count = most if keep >= 1 else max(len(mlps), room // each)
    standard = [(score_M - score_M.mean()) / score_M.std() for score_M in scores]
    for score_M in standard:
        score_M[score_M.argmax()] = torch.inf
    chosen = torch.zeros(most, dtype=torch.bool, device=standard[0].device)
    chosen[torch.cat(standard).topk(count).indices] = True
    return [part_M.nonzero()[:, 0] for part_M in chosen.split([mlp.width for mlp in mlps])]


def osscar(model: Any, ids_NL: Tensor, keep: float) -> None:
    """Take neurons away one by one, each time the one whose loss can be made up for best.

    OSSCAR (Meng et al. 2024, arXiv:2403.12983): the layer-wise least-squares error of the down
    projection's output, tr((W - B) H (W - B)ᵀ) with a ridge on H, B being the best weight on the
    neurons that are left. Greedy, without the local search over exchanges of neurons.
    """

    def prune(mlp: Mlp, gram_MM: Tensor) -> None:
        ridge = RIDGE * gram_MM.diagonal().mean()
        damped_MM = gram_MM + ridge * torch.eye(len(gram_MM)).to(gram_MM)
        down_OM = dense_weight(model.get_submodule(mlp.down)).double()
        kept_K = osscar_choice(down_OM, damped_MM, neurons_kept(mlp, keep))
        cross_OK = down_OM @ damped_MM[:, kept_K]
        factor_KK = torch.linalg.cholesky(damped_MM[kept_K][:, kept_K])
        keep_neurons(model, mlp, kept_K, torch.cholesky_solve(cross_OK.t(), factor_KK).t())

    layer_by_layer(model, ids_NL, prune)


def osscar_choice(down_OM: Tensor, gram_MM: Tensor, count: int) -> Tensor:
    """Return the `count` neurons that are left, (K,), in their order.

    Without neuron j the error of the best weight grows by ‖B_:j‖² / (H⁻¹)_jj; then B loses
    B_:j (H⁻¹)_j: / (H⁻¹)_jj and H⁻¹ its part of rank one, so nothing is solved again.

    Args:
        down_OM: W.
        gram_MM: H, positive definite.
        count: K.
    """
    inverse_MM = torch.cholesky_inverse(torch.linalg.cholesky(gram_MM))
    left_OM = down_OM.clone()
    gone_M = torch.zeros(len(gram_MM), dtype=torch.bool, device=gram_MM.device)
    for _ in range(len(gram_MM) - count):
        growth_M = left_OM.square().sum(0) / inverse_MM.diagonal()
        j = int(growth_M.masked_fill(gone_M, torch.inf).argmin())
        row_M, pivot = inverse_MM[j].clone(), float(inverse_MM[j, j])
        left_OM.addr_(left_OM[:, j].clone(), row_M, alpha=-1 / pivot)
        inverse_MM.addr_(row_M, row_M, alpha=-1 / pivot)
        gone_M[j] = True
    return (~gone_M).nonzero()[:, 0]


def modegpt(model: Any, ids_NL: Tensor, keep: float) -> None:
    """Keep the neurons of the highest ridge leverage; the Nyström approximation refits the rest.

    MoDeGPT (Lin et al. 2024, arXiv:2408.09632, algorithm 1): scores diag(C (C + λ)⁻¹), and
    W C_:K C_KK⁺ for the down projection. The same share in every layer, without the paper's
    allocation over layers; λ is this file's choice.
    """

    def prune(mlp: Mlp, gram_MM: Tensor) -> None:
        down_OM = dense_weight(model.get_submodule(mlp.down)).double()
        score_M = ridge_leverage(gram_MM, float(RIDGE * gram_MM.diagonal().mean()))
        kept_K = score_M.topk(neurons_kept(mlp, keep)).indices.sort().values
        keep_neurons(model, mlp, kept_K, nystroem(down_OM, gram_MM, kept_K))

    layer_by_layer(model, ids_NL, prune)


def ridge_leverage(gram_MM: Tensor, ridge: float) -> Tensor:
    """Return diag(C (C + λ)⁻¹), (M,)."""
    damped_MM = gram_MM + ridge * torch.eye(len(gram_MM)).to(gram_MM)
    return torch.linalg.solve(damped_MM, gram_MM).diagonal()


def nystroem(down_OM: Tensor, gram_MM: Tensor, kept_K: Tensor) -> Tensor:
    """Return W C_:K C_KK⁺, (O, K): the down projection's best weight on some of its inputs."""
    inverse_KK = torch.linalg.pinv(gram_MM[kept_K][:, kept_K], hermitian=True)
    return down_OM @ gram_MM[:, kept_K] @ inverse_KK


@torch.no_grad()
def whitened_svd(model: Any, ids_NL: Tensor, keep: float) -> None:
    """Make every projection of the MLPs a product of two thin matrices, best on its dense inputs.

    SVD-LLM (Wang et al. 2024, arXiv:2403.07378, section 3.1): the singular value decomposition of
    W C, with C the Cholesky factor of the inputs' second moments; both factors get the root of the
    singular values. Every projection alone.
    """
    if keep >= 1:
        return  # a product of full rank has more weights than the projection
    names = [name for mlp in find_mlps(model, find_layers(model)) for name in (*mlp.up, mlp.down)]
    sizes = [dense_weight(model.get_submodule(name)).shape[1] for name in names]
    moments = [GramAccumulator(size, device=model.device) for size in sizes]
    read_inputs(model, names, ids_NL, lambda index, x_TI: moments[index].update(x_TI))
    for name, moment in zip(names, moments, strict=True):
        site: Any = model.get_submodule(name)
        weight_OI, has_bias = dense_weight(site), site.bias is not None
        kind: dict[str, Any] = {"device": weight_OI.device, "dtype": weight_OI.dtype}
        block = LowRank(*weight_OI.shape[::-1], keep_ratio=keep, bias=has_bias, **kind)
        u_OR, v_RI = low_rank_factors(weight_OI.double(), moment.gram_II, block.rank)
        root_R = (v_RI @ moment.gram_II * v_RI).sum(1).clamp_min(1e-30) ** 0.25
        block.up.weight.copy_(u_OR * root_R)
        block.down.weight.copy_(v_RI / root_R[:, None])
        if has_bias:
            block.bias.copy_(site.bias)
        set_module(model, name, block)


@torch.no_grad()
def shortgpt(model: Any, ids_NL: Tensor, keep: float) -> None:
    """Drop whole layers, those that change the hidden states' direction least.

    ShortGPT (Men et al. 2024, arXiv:2403.03853, equation 1). As many as save the parameters that
    the other peers save in the MLPs, or just more.
    """
    layers = find_layers(model)
    stack: Any = model.get_submodule(layers.path)
    influence = block_influence(model, stack, ids_NL)
    wanted = mlp_parameters(model) * (1 - exact_ratio(keep))
    dropped: list[int] = []
    for index in influence.argsort().tolist():
        if sum(p.numel() for i in dropped for p in stack[i].parameters()) >= wanted:
            break
        dropped.append(index)
    if dropped:
        kept = [index for index in range(layers.count) if index not in dropped]
        recipe = Recipe.of({"name": "shortgpt", "depth": {"keep_layers": kept}})
        fitting.rewrite(model, planning.plan(model, recipe))


@torch.no_grad()
def block_influence(model: Any, stack: Sequence[nn.Module], ids_NL: Tensor) -> Tensor:
    """Return 1 - E[cos(layer's input, layer's output)] for every decoder layer."""
    total = torch.zeros(len(stack), dtype=torch.float64)

    def look(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            total[index] += cosine_similarity(before.double(), after.double(), dim=-1).sum().cpu()

        return hook

    hooks = [
        layer.register_forward_hook(look(index), with_kwargs=True)
        for index, layer in enumerate(stack)
    ]
    run_dense(model, ids_NL)
    for hook in hooks:
        hook.remove()
    return 1 - total / ids_NL.numel()


def neurons_kept(mlp: Mlp, keep: float) -> int:
    """Return how many neurons a share is, as recipes count them."""
    return max(1, int(mlp.width * exact_ratio(keep)))


def keep_best(model: Any, mlp: Mlp, score_M: Tensor, count: int) -> None:
    """Keep the neurons of the highest scores, with their weights as they are, in place."""
    kept_K = score_M.topk(count).indices.sort().values
    keep_neurons(model, mlp, kept_K, dense_weight(model.get_submodule(mlp.down))[:, kept_K])


def read_inputs(
    model: Any, names: Sequence[str], ids_NL: Tensor, add: Callable[[int, Tensor], None]
) -> None:
    """Run the whole model, and call `add(index, x_TI)` with what the modules read."""

    def look(index: int) -> Callable[..., None]:
        return lambda _module, args: add(index, args[0].flatten(0, -2))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(look(index))
        for index, name in enumerate(names)
    ]
    run_dense(model, ids_NL)
    for hook in hooks:
        hook.remove()


def run_dense(model: Any, ids_NL: Tensor) -> None:
    """Run the decoder on every window, for its hooks; the head is left out."""
    for window_L in ids_NL:
        model.get_decoder()(window_L[None].to(model.device), use_cache=False)


@torch.no_grad()
def layer_by_layer(model: Any, ids_NL: Tensor, prune: Callable[[Mlp, Tensor], None]) -> None:
    """Call `prune(mlp, gram_MM)` for each MLP in turn, which changes it in place.

    Args:
        model: a causal language model.
        ids_NL: text.
        prune: given E[x xᵀ] of what the down projection reads, (M, M), float64, in the model whose
            earlier layers are pruned.
    """
    layers = find_layers(model)
    stack = list(model.get_submodule(layers.path))
    by_layer = {layers.index_of(mlp.name): mlp for mlp in find_mlps(model, layers)}
    calls = record_calls(model, stack, list(ids_NL.to(model.device).split(1)))
    hidden = calls.hidden
    for index, layer in enumerate(stack):
        batches = list(zip(hidden, calls.extras[index], strict=True))
        mlp = by_layer.get(index)
        if mlp is not None:
            gram = GramAccumulator(mlp.width, device=model.device)
            down = {"down": model.get_submodule(mlp.down)}
            for h, extra in batches:
                _, seen = run_layer(layer, h, extra, inputs_of=down, stop_after_inputs=True)
                gram.update(seen["down"])
            prune(mlp, gram.gram_II)
        hidden = [run_layer(layer, h, extra)[0] for h, extra in batches]


PEERS: dict[str, Peer] = {
    "mean activation": mean_activation,
    "Wanda-sp": wanda_sp,
    "FLAP": flap,
    "OSSCAR": osscar,
    "MoDeGPT, MLP": modegpt,
    "whitened SVD": whitened_svd,
    "ShortGPT": shortgpt,
}
