"""Changes to what runs slim models elsewhere: shared by devices, in 8 or 4 bit."""

from __future__ import annotations

from ._mutation import change

MUTATIONS = (
    change(
        "llmslim/modeling/compat.py",
        "self.plan_of_blocks(tensors, distributed_config.tp_size),",
        "tensors,",
        "tensor parallelism stops in the middle of a low-rank block",
        "tests/test_tensor_parallel.py::test_two_processes_give_the_logits_of_the_dense_matrices",
    ),
    change(
        "llmslim/modeling/compat.py",
        "if shards and not _plans_by_name():",
        "if False:",
        "an older transformers fails in the first product",
        "tests/test_tensor_parallel.py::test_a_transformers_without_such_plans_is_refused",
    ),
    change(
        "llmslim/modeling/modeling_llmslim.py",
        "whole.add(_closed_around(name, plan))",
        "whole.add(name)",
        "a whole block meets a share of its inputs",
        "tests/test_tensor_parallel.py::test_a_block_that_cannot_be_sharded_is_whole_with_what_it_meets",
    ),
    change(
        "llmslim/modeling/modeling_llmslim.py",
        "return bool(size % (devices * unit) == 0)",
        "return bool(size % devices == 0)",
        "devices share a head of an attention",
        "tests/test_tensor_parallel.py::test_packed_outputs_have_two_halves_to_share",
    ),
    change(
        "llmslim/modeling/modeling_llmslim.py",
        'made |= {f"{name}.bias": style, name: "local_params"} if shards_bias else {}',
        "pass",
        "a whole bias meets a share of the outputs",
        "tests/test_tensor_parallel.py::test_two_processes_give_the_logits_of_the_dense_matrices",
    ),
    change(
        "llmslim/modeling/modeling_llmslim.py",
        "can = linear and (with_bias or not shards_bias)",
        "can = linear",
        "vLLM adds a whole bias to a share of the outputs",
        "tests/test_tensor_parallel.py::test_attention_that_vllm_cannot_shard_is_refused",
    ),
    change(
        "llmslim/modeling/modeling_llmslim.py",
        "if type(module) is nn.Linear:",
        "if False:",
        "vLLM shards the projections before a block that is whole",
        "tests/test_tensor_parallel.py::test_vllm_is_given_a_plan_of_full_names",
    ),
    change(
        "llmslim/editing/quantised.py",
        "return cls(low | high << 4,",
        "return cls(high | low << 4,",
        "the halves of each block of 4-bit weights are exchanged",
        "tests/test_quantize_blocks.py::test_every_value_is_the_nearest_step",
    ),
    change(
        "llmslim/editing/quantised.py",
        "codes = (values_DBS / scales.float()).round_()",
        "codes = (values_DBS / scales.float()).floor_()",
        "every quantised weight is half a step too small",
        "tests/test_quantize_blocks.py::test_every_value_is_the_nearest_step",
    ),
    change(
        "llmslim/editing/quantised.py",
        "clamp_(lowest, -lowest - 1)",
        "clamp_(lowest, -lowest)",
        "the largest positive weights change their sign",
        "tests/test_quantize_blocks.py::test_every_value_is_the_nearest_step",
    ),
    change(
        "llmslim/editing/quantised.py",
        "stacked = len(weight) if weight.dim() > 2 else 1",
        "stacked = len(weight)",
        "rows of a narrow matrix are padded one by one, and take ten times the memory",
        "tests/test_quantize_blocks.py::test_a_matrix_alone_is_padded_once",
    ),
    change(
        "llmslim/editing/quantised.py",
        "if _picks_from_stack(func, args):",
        "if False:",
        "to multiply with one expert all are dequantised",
        "tests/test_quantize_blocks.py::test_of_a_stack_only_what_is_taken_is_dequantised",
    ),
    change(
        "llmslim/editing/quantised.py",
        "if changes_arguments(func) and any(",
        "if False and any(",
        "training or loading a quantised model does nothing to its blocks, without a word",
        "tests/test_quantize_blocks.py::test_quantised_weights_are_read_only",
    ),
    change(
        "llmslim/modeling/modeling_llmslim.py",
        'if getattr(parameter, "is_in_memory_only", False):',
        "if False:",
        "saving quantised blocks fails deep inside safetensors",
        "tests/test_quantize_blocks.py::test_saving_is_refused_before_anything_is_written",
    ),
)
