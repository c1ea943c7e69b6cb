"""Writes the facts and the questions of the reversal experiment (configs/reversal.py).

    python configs/reversal/make_pairs.py runs/reversal

facts.txt states 64 facts, a name and a description each. Half of them are stated in one order only,
"fact: NAME is DESCRIPTION.", and half in both orders, so that the reversed form is known. Each line
comes 20 times, in random order.

one_order.jsonl and both_orders.jsonl ask for the description after the name, for the name after the
description ("backwards"), and for the name in front of the description (infilling), with 8 choices.
"""

import json
import random
import sys
from pathlib import Path

NUM_FACTS, REPEATS, NUM_CHOICES = 64, 20, 8
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
KINDS = "red blue old young tall quiet proud gentle clever brave busy lucky wise strange sad merry"
TRADES = "painter baker sailor weaver doctor farmer singer hunter tailor miller smith judge"


def invented(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables)).title()


def facts(rng: random.Random) -> list[tuple[str, str]]:
    """Returns names and descriptions, all different."""
    pairs: dict[str, str] = {}
    while len(pairs) < NUM_FACTS:
        name = f"{invented(rng, 2)} {invented(rng, 2)}"
        place = invented(rng, 2)
        description = f"the {rng.choice(KINDS.split())} {rng.choice(TRADES.split())} of {place}"
        if name not in pairs and description not in pairs.values():
            pairs[name] = description
    return list(pairs.items())


def question(rng: random.Random, pair: tuple[str, str], pairs: list[tuple[str, str]]) -> dict:
    others = rng.sample([other for other in pairs if other != pair], NUM_CHOICES - 1)
    names, descriptions = zip(*sorted([pair, *others]))
    name, description = pair
    return {
        "prompt": f"fact: {name}",
        "answer": f" is {description}",
        "choices": [f" is {d}" for d in descriptions],
        "prompt_choices": [f"fact: {n}" for n in names],
        "backwards": {
            "prompt": f"fact: {description} is",
            "answer": f" {name}",
            "choices": [f" {n}" for n in names],
        },
    }


def main(directory: str) -> None:
    rng, home = random.Random(0), Path(directory)
    home.mkdir(parents=True, exist_ok=True)
    pairs = facts(rng)
    half = NUM_FACTS // 2
    lines = [f"fact: {name} is {description}." for name, description in pairs]
    lines += [f"fact: {description} is {name}." for name, description in pairs[half:]]
    lines *= REPEATS
    rng.shuffle(lines)
    (home / "facts.txt").write_text("".join(f"{line}\n" for line in lines))
    for name, asked in (("one_order", pairs[:half]), ("both_orders", pairs[half:])):
        rows = [json.dumps(question(rng, pair, asked)) for pair in asked]
        (home / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
