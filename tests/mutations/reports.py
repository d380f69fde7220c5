"""Changes to reports, in every form."""

from __future__ import annotations

from ._mutation import change

MUTATIONS = (
    change(
        "llmslim/report/page/heat.py",
        "max(0.0, 1 - self.line.params_after / before)",
        "max(0.0, self.line.params_after / before)",
        "the map is dark where nothing was removed",
        "tests/test_report_page.py::test_the_map_has_every_projection_of_every_layer_once",
    ),
    change(
        "llmslim/report/page/html.py",
        "autoescape=True",
        "autoescape=False",
        "a model's name can run a script in the page of its report",
        "tests/test_report_page.py::test_words_from_outside_stay_words",
    ),
    change(
        "llmslim/report/page/comparison.py",
        "return (max if self.measure.more_is_better else min)(known)[1]",
        "return max(known)[1]",
        "the worst model of a comparison is shown as the best",
        "tests/test_compare.py::test_rows_hold_what_each_report_holds",
    ),
    change(
        "llmslim/report/speeds.py",
        "return (speedup - 1) / (self.ideal - 1)",
        "return speedup / self.ideal",
        "a model that is no faster has reached a part of the gain",
        "tests/test_bench.py::test_the_share_of_the_ideal_is_honest",
    ),
    change(
        "llmslim/report/scores.py",
        "math.sqrt(variance / count)",
        "math.sqrt(variance)",
        "intervals are those of a window, not of the mean",
        "tests/test_evaluate.py::test_an_interval_covers_the_mean_as_often_as_it_says",
    ),
    change(
        "llmslim/report/lines.py",
        "        row.params_before,\n        row.params_after,\n",
        "        row.params_before,\n",
        "lines hide rows of other sizes",
        "tests/test_reporting.py::test_rows_of_which_something_else_is_left_are_no_one_line",
    ),
    change(
        "llmslim/report/lines.py",
        "if spans and number == spans[-1][1] + 1:",
        "if spans and number > spans[-1][1]:",
        "layers are named that are not meant",
        "tests/test_reporting.py::test_rows_of_which_something_else_is_left_are_no_one_line",
    ),
    change(
        "llmslim/report/wording.py",
        "if scaled < 999.5:",
        "if scaled < 1000:",
        "999,999 is 1000k",
        "llmslim/report/wording.py",
    ),
    change(
        "llmslim/report/wording.py",
        'return f"{row.out_features}x{row.in_features}"',
        'return f"{row.in_features}x{row.out_features}"',
        "sizes are exchanged",
        "tests/test_reporting.py::test_golden",
    ),
    change(
        "llmslim/report/wording.py",
        "return printable(row.reason)",
        "return row.reason",
        "a report steers the terminal",
        "tests/test_reporting.py::test_no_word_of_a_report_steers_the_terminal",
    ),
    change(
        "llmslim/report/bars.py",
        "filled = round(width * after / widest)",
        "filled = round(width * before / widest)",
        "bars show what was there before",
        "tests/test_reporting.py::test_bars_are_as_long_as_the_layers_are_large",
    ),
    change(
        "llmslim/report/bars.py",
        "widest = max(max(pair) for pair",
        "widest = max(pair[0] for pair",
        "a widened layer has a bar wider than the page",
        "tests/test_reporting.py::test_a_widened_layer_has_the_longest_bar",
    ),
    change(
        "llmslim/report/data.py",
        '{**asdict(row), "options": json.dumps(row.options)}',
        "asdict(row)",
        "options are no JSON",
        "tests/test_reporting.py::test_csv_holds_every_field_of_every_row",
    ),
    change(
        "llmslim/report/card.py",
        'fence = "`" * max(3, 1 +',
        'fence = "`" * max(3, 0 +',
        "a recipe ends its own fence",
        "tests/test_reporting.py::test_card_fences_a_recipe_that_has_fences",
    ),
    change(
        "llmslim/report/card.py",
        "[_HONEST] if changed else []",
        "[]",
        "a card hides that nothing was trained",
        "tests/test_reporting.py::test_golden",
    ),
    change(
        "llmslim/report/read.py",
        "return healing if isinstance(healing, dict) else None",
        "return None",
        "the card forgets the healing",
        "tests/test_healing_checkpoint.py::test_the_report_command_tells_of_the_healing",
    ),
    change(
        "llmslim/report/healed.py",
        'line = line.replace(char, f"\\\\{char}")',
        "pass",
        "what a model says ends the table",
        "tests/test_healing_checkpoint.py::test_a_card_cannot_be_broken_by_what_a_model_says",
    ),
    change(
        "llmslim/report/report.py",
        "self.non_embedding_after / before if before else 1.0",
        "self.non_embedding_after / before",
        "a model of embeddings alone ends in a traceback",
        "tests/test_reporting.py::test_an_empty_report_has_views_too",
    ),
)
