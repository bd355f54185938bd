"""Which tasks of reasoning-gym can be used, and what of their entries.

Every `score_answer` of reasoning-gym 0.1.25 was read, with all that it calls. Those listed here by what they do neither
run code nor can be kept busy by an answer; tests/test_reasoning_gym.py looks for the former in their source.
"""

import re
from collections.abc import Mapping

EQUAL = frozenset(
    {
        "acre",
        "aiw",
        "arc_1d",
        "base_conversion",
        "basic_arithmetic",
        "bf",
        "binary_alternation",
        "caesar_cipher",
        "count_bits",
        "count_primes",
        "course_schedule",
        "gcd",
        "largest_island",
        "lcm",
        "leg_counting",
        "letter_counting",
        "mahjong_puzzle",
        "maze",
        "modulo_grid",
        "number_filtering",
        "number_sequence",
        "rotate_matrix",
        "rotten_oranges",
        "simple_equations",
        "simple_geometry",
        "string_manipulation",
        "string_splitting",
        "string_synthesis",
        "syllogism",
        "word_sequence_reversal",
    }
)
"""The scorer of the base class: 1 for the gold text, its share of the length for an answer that contains it."""

COMPARED = frozenset(
    {
        "ab",
        "calendar_arithmetic",
        "circuit_logic",
        "color_cube_rotation",
        "dice",
        "emoji_mystery",
        "family_relationships",
        "figlet_font",
        "knights_knaves",
        "letter_jumble",
        "manipulate_matrix",
        "needle_haystack",
        "palindrome_generation",
        "path_star",
        "self_reference",
        "sentence_reordering",
        "spell_backward",
        "tsumego",
        "word_sorting",
        "zebra_puzzles",
    }
)
"""The scorer compares texts, words or characters."""

NUMBERS = frozenset(
    {
        "advanced_geometry",
        "chain_sum",
        "coin_flip",
        "complex_arithmetic",
        "decimal_arithmetic",
        "decimal_chain_sum",
        "fraction_simplification",
        "gsm_symbolic",
        "number_format",
        "polynomial_equations",
        "power_function",
        "prime_factorization",
        "products",
        "rectangle_count",
        "time_intervals",
    }
)
"""The scorer reads numbers through int, float, complex, Decimal or Fraction."""

STRUCTURES = frozenset(
    {
        "boxnet",
        "cryptarithm",
        "futoshiki",
        "game_of_life",
        "graph_color",
        "group_anagrams",
        "jugs",
        "kakurasu",
        "mini_sudoku",
        "palindrome_partitioning",
        "pool_matrix",
        "quantum_lock",
        "rush_hour",
        "shortest_path",
        "sokoban",
        "sudoku",
        "survo",
        "tower_of_hanoi",
    }
)
"""The scorer reads JSON, a grid, or a list of moves, which it plays; no move takes longer than the answer is long."""

ALLOWED = EQUAL | COMPARED | NUMBERS | STRUCTURES
"""Tasks whose answers reasoning-gym scores."""

UNANSWERED = frozenset({"boxnet", "graph_color", "rush_hour"})
"""Tasks that come without a gold answer: many are right."""

REFUSED: Mapping[str, str] = {
    "codeio": "it generates rows by running code, and scores with a distance that an answer can make slow",
    "composite": "it has no rows of its own",
    "intermediate_integration": "its scorer evaluates the answer",
    "isomorphic_strings": "its rows differ from process to process",
    "knight_swap": "its rows differ from process to process",
    "list_functions": "its rows differ from process to process",
    "polynomial_multiplication": "its scorer evaluates the answer, and its rows differ from process to process",
    "propositional_logic": "its scorer tries all values of all variables that an answer names",
    "ransom_note": "its rows differ from process to process",
    "rubiks_cube": "its scorer repeats a move as often as the answer says",
    "simple_integration": "its scorer evaluates the answer",
    "word_ladder": "its rows differ from process to process",
}
"""Why a task cannot be used."""

READS: Mapping[str, tuple[str, ...]] = {
    "advanced_geometry": ("incircle_radius_exact", "ortho", "task_type"),
    "boxnet": ("initial_state",),
    "calendar_arithmetic": ("task",),
    "complex_arithmetic": ("result",),
    "countdown": ("numbers", "target"),
    "cryptarithm": ("allow_leading_zero", "result_letters", "words_letters"),
    "fraction_simplification": ("denominator", "numerator", "simplified_denominator", "simplified_numerator"),
    "futoshiki": ("solution",),
    "graph_color": ("puzzle",),
    "group_anagrams": ("solution",),
    "jugs": ("puzzle",),
    "kakurasu": ("col_sums", "n_cols", "n_rows", "row_sums"),
    "mini_sudoku": ("solution",),
    "n_queens": ("valid_answers",),
    "number_format": ("solution",),
    "number_sorting": ("direction",),
    "palindrome_generation": ("letters",),
    "palindrome_partitioning": ("solution",),
    "puzzle24": ("numbers",),
    "quantum_lock": ("buttons", "initial_state", "initial_value", "target_value"),
    "rush_hour": ("board_config",),
    "shortest_path": ("matrix",),
    "sokoban": ("gamestr",),
    "sudoku": ("solution",),
    "survo": ("board_size", "solution"),
    "time_intervals": ("task_type",),
    "tower_of_hanoi": ("num_disks", "num_pegs", "solution_length", "start_peg", "target_peg"),
    "word_sorting": ("sorted_words",),
}
"""What a scorer reads of an entry's metadata, where it has it; nothing else is kept: other keys hold today's date."""

FORBIDDEN: Mapping[str, re.Pattern[str]] = {
    "boxnet": re.compile(r"[^)]{1000}"),  # its pattern for a move takes quadratic time on one that is not closed
    "coin_flip": re.compile(r"[^-+0-9./, eE]|[eE][-+]?[0-9]{4}"),  # Fraction("1e999999999") takes all memory
    "complex_arithmetic": re.compile(r"[^-+0-9.ijIJ() ]"),  # "nan" would score 1
    "rush_hour": re.compile(r"[0-9]{3}"),  # a move takes as many steps as it says
}
"""What makes an answer to such a task score 0 before its scorer sees it."""
