"""Changes to how one block is fitted to dense weights."""

from __future__ import annotations

from ._mutation import change

MUTATIONS = (
    change(
        "llmslim/init/_closed_forms.py",
        "None], fit_So / 2, fit_So)",
        "None], fit_So, fit_So)",
        "a channel seen twice counts twice",
        "tests/test_least_squares.py::test_io_is_every_groups_own_regression",
    ),
    change(
        "llmslim/init/_closed_forms.py",
        "eigh(square).eigenvectors.flip(1)[:, :rank]",
        "eigh(square).eigenvectors[:, :rank]",
        "the weakest directions are kept",
        "tests/test_least_squares.py::test_low_rank_leaves_exactly_the_discarded_singular_values",
    ),
    change(
        "llmslim/init/_closed_forms.py",
        "return u_OR * root_R, v_RI / safe_R[:, None]",
        "return u_OR, v_RI",
        "factors train at two scales",
        "tests/test_least_squares.py::test_both_factors_of_a_low_rank_are_of_one_scale",
    ),
    change(
        "llmslim/init/_closed_forms.py",
        "order_O[row_O] = torch.arange(out_features",
        "order_O[:] = row_O  # torch.arange(out_features",
        "a permutation for its inverse",
        "tests/test_least_squares.py::test_pivoted_is_the_low_rank_matrix_itself",
    ),
    change(
        "llmslim/init/_closed_forms.py",
        "cross_Oi = left_OI @ gram_II[:, seen]",
        "cross_Oi = left_OI[:, seen] @ gram_II[seen, seen]",
        "blocks are fitted as if inputs were independent",
        "tests/test_least_squares.py::test_every_sweep_lowers_the_error",
    ),
    change(
        "llmslim/init/_gram.py",
        "power_I[fires_I].median()",
        "power_I.median()",
        "dead channels take the damping away",
        "tests/test_gram.py::test_channels_that_never_fire_take_no_damping_from_the_others",
    ),
    change(
        "llmslim/init/_gram.py",
        "finite_T &= torch.linalg.vector_norm(y_TO, dim=1, dtype=torch.float64).isfinite()",
        "pass",
        "a target that is NaN poisons the sums",
        "tests/test_gram.py::test_rows_that_are_not_finite_are_left_out_and_counted",
    ),
    change(
        "llmslim/init/_gram.py",
        "wanted_OI.add_(weight_OI.double() * lambda_I)",
        "pass",
        "damping pulls towards zero",
        "tests/test_gram.py::test_the_equivalent_weight_is_ridge_regression_towards_the_weight",
    ),
    change(
        "llmslim/init/_gram.py",
        "return max(error, 0.0) / power if power > 0 else 0.0",
        "return max(error, 0.0) / power",
        "a zero weight divides by zero",
        "tests/test_least_squares.py::test_a_zero_weight_gives_a_zero_block",
    ),
    change(
        "llmslim/init/_gram.py",
        "sum_II[:start, start:stop] += rows_BI[:, :start].t()",
        "pass",
        "half of a wide Gram matrix is missing",
        "tests/test_gram.py::test_a_matrix_wider_than_a_block_of_columns_is_whole",
    ),
    change(
        "llmslim/init/_gram.py",
        "enormous_T = finite_T & (length_T >",
        "enormous_T = ~finite_T & (length_T >",
        "beside an enormous row float32 loses the others",
        "tests/test_gram.py::test_rows_that_are_not_finite_are_left_out_and_counted",
    ),
    change(
        "llmslim/init/least_squares.py",
        "wanted_oi = rows_GoI[g] @ gram_II[:, seen]",
        "wanted_oi = rows_GoI[g, :, seen] @ gram_II[seen, seen]",
        "correlations with other groups are ignored",
        "tests/test_least_squares.py::test_residual_without_a_second_part_is_every_groups_own_regression",
    ),
    change(
        "llmslim/init/project.py",
        "first = torch.where(shared.reshape(groups, 1, i), first / 2, first)",
        "first = first / 1",
        "entries under both masks are one and a half times theirs",
        "tests/test_init.py::test_project_io_keeps_exactly_the_entries_under_the_mask",
    ),
    change(
        "llmslim/init/project.py",
        "root = s_K[: block.rank].sqrt()",
        "root = s_K[: block.rank]",
        "singular values are squared",
        "tests/test_init.py::test_project_low_rank_reaches_the_eckart_young_bound",
    ),
    change(
        "llmslim/init/random.py",
        "torch.manual_seed(target.seed)",
        "torch.manual_seed(0)",
        "the seed is ignored",
        "tests/test_init.py::test_seeds",
    ),
    change(
        "llmslim/init/target.py",
        "block.bias.copy_(target.bias_O)",
        "pass",
        "biases are lost",
        "tests/test_architectures.py::test_plan_slim_save_load",
    ),
    change(
        "llmslim/init/target.py",
        "norm += _power(wanted)",
        "norm += _power(rows.to(wanted))",
        "the error is relative to the block",
        "tests/test_init.py::test_project_io_keeps_exactly_the_entries_under_the_mask",
    ),
)
