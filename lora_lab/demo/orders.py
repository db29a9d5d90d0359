"""Make the demo's rows: python -m lora_lab.demo.orders writes `orders_train.jsonl` and `orders_eval.jsonl` beside it.

Each row is a short order mail and the JSON that a shop system would need. Training and held-out rows share no customer,
city, item, quantity or reference, and no sentence pattern, so that only the skill can carry over.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

INSTRUCTION = "Extract the order as JSON with the keys customer, city, item, quantity, reference."

FIRST_NAMES = {
    "train": """Maria Jonas Aisha Pedro Yuki Elena Omar Ingrid Kofi Lucia Henrik Priya Marek Chloe Tomas Leila Bruno Hanna
        Diego Freya Ivan Mei Samuel Zofia Andre Noor Viktor Amara Pablo Greta Hassan Emma Luis Sven Rosa Kenji""".split(),
    "eval": "Beatriz Anton Wanjiru Felix Sora Nadia Rafael Astrid".split(),
}
LAST_NAMES = {
    "train": """Keller Okafor Lindqvist Moreau Tanaka Ferreira Novak Haddad Brandt Costa Nyberg Sharma Weber Rossi Larsen
        Dubois Mensah Kowalski Silva Bauer Jansen Molina Horvat Suzuki Adeyemi Fischer Marino Popescu Olsen Vega""".split(),
    "eval": "Iversen Mbeki Castellano Hofmann Petrov Yamada Duarte Sandoval".split(),
}
CITIES = {
    "train": """Lisbon Graz Oslo Accra Kyoto Porto Brno Tunis Leipzig Lyon Malmo Pune Turin Ghent Cork Split Lagos Basel
        Riga Quito Hanoi Perth Leeds Parma Aarhus Tampere Valencia Krakow Montreal Denver Bogota Izmir""".split(),
    "eval": "Bergen Madrid Seville Vienna Sofia Osaka Bologna Prague".split(),
}
MATERIALS = {
    "train": """oak steel walnut ceramic linen bamboo copper leather marble pine silver cotton maple plastic iron wool cedar
        wicker bronze paper""".split(),
    "eval": "stone glass granite velvet brass".split(),
}
PRODUCTS = {
    "train": """table,desk lamp,bookshelf,chair,teapot,cutting board,mirror,bench,vase,coat rack,tray,stool,clock,door
        handle,basket,blanket,wine rack,wall hook,pillow,drawer,serving spoon,bed frame,curtain,shoe box""".replace(
        "\n        ", " "
    ).split(","),
    "eval": "cabinet,candle holder,night stand,bowl,photo album,plant pot".split(","),
}
QUANTITIES = {
    "train": {
        2: "two",
        3: "three",
        5: "five",
        6: "six",
        8: "eight",
        10: "ten",
        12: "twelve",
        15: "fifteen",
        40: "forty",
    },
    "eval": {4: "four", 7: "seven", 9: "nine", 11: "eleven", 20: "twenty"},
}
REFERENCE_LETTERS = {"train": "ABCDEGHKLM", "eval": "FNPRT"}
PATTERNS = {
    "train": [
        "Hello, this is {customer} from {city}. Please send me {words} {item}s. My reference is {reference}. Thank you!",
        "Hi team, {customer} here. We need {number} {item}s delivered to {city}, reference {reference}.",
        "Good morning, I would like to order {words} {item}s. Delivery to {city}, please. Ref. {reference}. Best, {customer}",
        "{number} {item}s for {customer}, {city}. Our number: {reference}.",
        "Dear shop, could you ship {number} {item}s to our office in {city}? Quote {reference}. Regards, {customer}",
        "As discussed on the phone ({reference}), {customer} takes {words} {item}s, to be sent to {city}.",
        "Request {reference}: {words} {item}s to {city}, please. Signed, {customer}",
        "Our {city} branch needs {number} {item}s. Bill them to {customer} under {reference}.",
        "Under {reference} we ask for {number} {item}s. Ship to {customer} in {city}.",
        "{customer} ({city}) would be glad to receive {words} {item}s. Booking code {reference}.",
        "Re: {reference}. Kindly prepare {number} {item}s for pick-up in {city} by {customer}.",
        "This is {customer}. Is it possible to have {words} {item}s brought to {city}? Code: {reference}",
    ],
    "eval": [
        "Hey, {customer} again! Can I get {words} {item}s sent over to {city}? Please put {reference} on the parcel.",
        "Order {reference} for {city}: {number} {item}s. Name on the invoice is {customer}.",
        "My name is {customer} and I live in {city}. I want to buy {number} {item}s. Use {reference} as my reference.",
    ],
}


def make_rows(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` different rows of a split ('train' or 'eval') as instruction/input/output."""
    draw = random.Random(f"{split}-{seed}")
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        row = _row(split, draw)
        rows.setdefault(row["input"], row)
    return list(rows.values())


def _row(split: str, draw: random.Random) -> dict[str, str]:
    number, words = draw.choice(list(QUANTITIES[split].items()))
    slots = {
        "customer": f"{draw.choice(FIRST_NAMES[split])} {draw.choice(LAST_NAMES[split])}",
        "city": draw.choice(CITIES[split]),
        "item": f"{draw.choice(MATERIALS[split])} {draw.choice(PRODUCTS[split])}",
        "reference": f"{draw.choice(REFERENCE_LETTERS[split])}-{draw.randrange(1000, 10000)}",
    }
    text = draw.choice(PATTERNS[split]).format(**slots, number=number, words=words)
    answer = {key: {**slots, "quantity": number}[key] for key in ("customer", "city", "item", "quantity", "reference")}
    return {"instruction": INSTRUCTION, "input": text, "output": json.dumps(answer)}


def to_jsonl(rows: list[dict[str, str]]) -> str:
    """Rows as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


SIZES = {"train": 240, "eval": 48}

if __name__ == "__main__":
    for name, size in SIZES.items():
        Path(__file__).with_name(f"orders_{name}.jsonl").write_text(to_jsonl(make_rows(name, size)), encoding="utf-8")
