"""Changes to how recipes are read."""

from __future__ import annotations

from ._mutation import change

MUTATIONS = (
    change(
        "llmslim/recipe/match.py",
        "if rule.is_for(role) and any(",
        "if rule.is_for(role) or any(",
        "a role or a glob is enough",
        "tests/test_recipe_match.py::test_a_glob_matches_the_whole_name",
    ),
    change(
        "llmslim/recipe/match.py",
        "fnmatchcase(name, glob)",
        "fnmatchcase(name.lower(), glob.lower())",
        "case does not count",
        "tests/test_recipe_match.py::test_a_glob_matches_the_whole_name",
    ),
    change(
        "llmslim/recipe/roles.py",
        'role.startswith(f"{wanted}.")',
        "role.startswith(wanted)",
        "attention.q means attention.qkv, too",
        "tests/test_recipe_match.py::test_a_role_means_itself_and_its_parts_and_no_longer_name",
    ),
    change(
        "llmslim/recipe/load.py",
        "line = key_node.start_mark.line + 1",
        "line = key_node.start_mark.line",
        "messages name the line above",
        "tests/test_recipe_load.py::test_a_wrong_value_is_refused_with_file_line_key_and_value",
    ),
    change(
        "llmslim/recipe/load.py",
        "if key in seen:",
        "if False:",
        "the second of two keys wins",
        "tests/test_recipe_load.py::test_what_is_not_a_recipe_is_refused_in_one_sentence",
    ),
    change(
        "llmslim/recipe/load.py",
        "if isinstance(event, yaml.AliasEvent):",
        "if False:",
        "a page of YAML takes all memory",
        "tests/test_recipe_load.py::test_what_is_not_a_recipe_is_refused_in_one_sentence",
    ),
    change(
        "llmslim/recipe/load.py",
        'data.setdefault("name", path.stem)',
        'data["name"] = path.stem',
        "a recipe's own name is ignored",
        "tests/test_recipe_load.py::test_a_recipe_reads_back_under_its_own_name_with_all_that_was_set",
    ),
    change(
        "llmslim/recipe/load.py",
        'data = recipe.model_dump(mode="json", exclude_unset=True)',
        'data = recipe.model_dump(mode="json", exclude_defaults=True)',
        "what was set to the default is forgotten",
        "tests/test_recipe_load.py::test_a_recipe_reads_back_under_its_own_name_with_all_that_was_set",
    ),
    change(
        "llmslim/recipe/rule.py",
        'extra="forbid", frozen=True',
        'extra="ignore", frozen=True',
        "misspelt keys do nothing",
        "tests/test_recipe_load.py::test_a_recipe_comes_from_a_dictionary_a_path_a_name_or_itself",
    ),
    change(
        "llmslim/recipe/rule.py",
        "if (self.keep is None) == (self.structure is None):",
        "if self.keep is None and self.structure is None:",
        "a rule keeps and replaces",
        "tests/test_recipe_load.py::test_a_rule_keeps_or_replaces",
    ),
    change(
        "llmslim/recipe/rule.py",
        "if hasattr(Rule, option.name) or option.name in (*Rule.model_fields, *_OF_BLOCKS):",
        "if False:",
        "a plug-in's option takes a key from every rule",
        "tests/test_plugins.py::test_an_option_cannot_have_the_name_of_a_key_that_every_rule_has",
    ),
    change(
        "llmslim/recipe/rule.py",
        'return float(Fraction(value.replace(" ", "")))',
        'return float(Fraction(value.replace(" ", "").partition("/")[0]))',
        "1/3 is 1",
        "llmslim/recipe/schema.py",
        "tests/test_recipe_load.py::test_every_key_arrives",
    ),
    change(
        "llmslim/recipe/schema.py",
        "if self.has_auto and self.budget is None:",
        "if False:",
        "a recipe without a budget ends in a traceback",
        "tests/test_allocation.py::test_what_makes_no_sense_is_refused",
        "tests/test_recipe_load.py::test_a_wrong_value_is_refused_with_file_line_key_and_value",
    ),
)
