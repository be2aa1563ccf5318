"""The four tasks of the demo adapters: their examples, and what counts as a right answer.

Pure data and string work, the same on every machine for the same seed. Knows nothing of torch,
models or training: `train.py` learns from these examples, the tests score answers with them.

Each task enumerates combinations of slots (say table x column x value). The held-out examples are
combinations that no training example has; single slots occur in both.
"""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

SEED = 20
NUM_HELD_OUT = 100

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Example:
    """One user message, an answer to learn, and what `Task.score` compares an answer with.

    `expected` is the answer itself, except for the pirate: there it is the fact to be named.
    """

    question: str
    answer: str
    expected: str


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One line of a committed `held_out.jsonl`: a conversation to send, and what to expect."""

    messages: list[dict[str, str]]
    expected: str


@dataclass(frozen=True, slots=True)
class Split:
    """Training and held-out examples that share no combination of slots."""

    train: list[Example]
    held_out: list[Example]


@dataclass(frozen=True, slots=True)
class Task:
    """What one adapter was trained to do.

    `score(expected, answer)` tells whether an answer is right. `max_tokens` is enough for every
    right answer. `build(rng, num_train)` makes the examples.
    """

    name: str
    tenant: str
    description: str
    max_tokens: int
    num_train: int
    score: Callable[[str, str], bool]
    build: Callable[[random.Random, int], Split]

    @property
    def public_name(self) -> str:
        """The `model` that a client of the API asks for."""
        return f"{self.tenant}-{self.name}"

    @property
    def folder(self) -> Path:
        """Where the committed adapter and its held-out examples lie."""
        return Path(__file__).parent / self.name

    def split(self, seed: int = SEED) -> Split:
        """Generate the training and held-out examples; equal seeds give equal examples."""
        return self.build(random.Random(f"{self.name} {seed}"), self.num_train)


def held_out_line(example: Example) -> str:
    """One line of `held_out.jsonl`, without the line end."""
    messages = [{"role": "user", "content": example.question}]
    return json.dumps({"messages": messages, "expected": example.expected})


def read_held_out(task: Task) -> list[HeldOut]:
    """Read the committed held-out examples of a task."""
    lines = (task.folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [HeldOut(**json.loads(line)) for line in lines]


def _split(
    rng: random.Random,
    num_train: int,
    *,
    keys: Sequence[Key],
    render: Callable[[random.Random, Key], Example],
) -> Split:
    """Hold out `NUM_HELD_OUT` keys; go round the others until there are `num_train` examples."""
    shuffled = list(keys)
    rng.shuffle(shuffled)
    held_out, rest = shuffled[:NUM_HELD_OUT], shuffled[NUM_HELD_OUT:]
    train = [render(rng, key) for key in itertools.islice(itertools.cycle(rest), num_train)]
    return Split(train, [render(rng, key) for key in held_out])


# sql: a question about the shop's four tables -> one SELECT


@dataclass(frozen=True, slots=True)
class _Filter:
    table: str
    column: str
    phrase: str
    values: tuple[str, ...]


_FILTERS = (
    _Filter("customers", "city", "customers in {}", ("Berlin", "Lisbon", "Oslo", "Madrid", "Rome")),
    _Filter(
        "customers", "plan", "customers on the {} plan", ("free", "basic", "pro", "team", "trial")
    ),
    _Filter("orders", "status", "{} orders", ("open", "paid", "shipped", "returned", "cancelled")),
    _Filter(
        "orders", "country", "orders from {}", ("France", "Japan", "Canada", "Brazil", "Poland")
    ),
    _Filter(
        "employees",
        "department",
        "employees in the {} department",
        ("sales", "legal", "finance", "support", "design"),
    ),
    _Filter(
        "employees",
        "office",
        "employees at the {} office",
        ("Paris", "Dublin", "Tokyo", "Boston", "Vienna"),
    ),
    _Filter(
        "products",
        "category",
        "products in the {} category",
        ("garden", "kitchen", "sports", "music", "office"),
    ),
    _Filter(
        "products", "brand", "products made by {}", ("Zenith", "Polar", "Nimbus", "Atlas", "Orion")
    ),
)
_NUMBERS = {
    "customers": ("age", "credit"),
    "orders": ("total", "weight"),
    "employees": ("salary", "bonus"),
    "products": ("price", "stock"),
}
_AGGREGATES = {"average": "AVG", "highest": "MAX", "lowest": "MIN", "combined": "SUM"}
_COMPARISONS = {"above": ">", "below": "<"}
_ORDERS = {"highest": "DESC", "lowest": "ASC"}

_SqlKey = tuple[_Filter, str, str, str, str]


def _sql_keys() -> Iterator[_SqlKey]:
    for where in _FILTERS:
        for value in where.values:
            yield where, value, "list", "", ""
            yield where, value, "count", "", ""
            for number in _NUMBERS[where.table]:
                for kind, words in (
                    ("aggregate", _AGGREGATES),
                    ("compare", _COMPARISONS),
                    ("top", _ORDERS),
                ):
                    for word in words:
                        yield where, value, kind, number, word


def _sql_example(rng: random.Random, key: _SqlKey) -> Example:
    where, value, kind, number, word = key
    rows = where.phrase.format(value)
    limit, amount = rng.randint(2, 9), rng.randint(2, 99) * 10
    select, tail = "*", ""
    match kind:
        case "list":
            phrasings = [f"Show all {rows}.", f"Give me the {rows}.", f"Which {rows} do we have?"]
        case "count":
            phrasings = [f"How many {rows} are there?", f"Count the {rows}."]
            select = "COUNT(*)"
        case "aggregate":
            phrasings = [
                f"What is the {word} {number} of {rows}?",
                f"Tell me the {word} {number} for {rows}.",
            ]
            select = f"{_AGGREGATES[word]}({number})"
        case "compare":
            phrasings = [
                f"Show {rows} with a {number} {word} {amount}.",
                f"Which {rows} have a {number} {word} {amount}?",
            ]
            tail = f" AND {number} {_COMPARISONS[word]} {amount}"
        case _:
            phrasings = [
                f"Show the {limit} {rows} with the {word} {number}.",
                f"Which {limit} {rows} have the {word} {number}?",
            ]
            tail = f" ORDER BY {number} {_ORDERS[word]} LIMIT {limit}"
    sql = f"SELECT {select} FROM {where.table} WHERE {where.column} = '{value}'{tail};"
    return Example(rng.choice(phrasings), sql, sql)


def _sql_split(rng: random.Random, num_train: int) -> Split:
    return _split(rng, num_train, keys=list(_sql_keys()), render=_sql_example)


def _score_sql(expected: str, answer: str) -> bool:
    return expected.split() == answer.split()


# triage: a support ticket -> one of five labels

# fmt: off
_TICKETS = {
    "billing": (
        ("My invoice", "The last payment", "The March charge", "The receipt", "The annual fee",
         "The credit note", "The amount on my card", "The bill for our team"),
        ("is wrong by twenty euros", "was taken twice", "ignores the discount",
         "lacks our VAT number", "should be refunded", "is higher than agreed",
         "has the wrong currency", "was due next month, not today"),
    ),
    "bug": (
        ("The export button", "The dashboard", "The search page", "The mobile app",
         "The report editor", "The calendar view", "The chart", "The settings page"),
        ("crashes every time", "shows a blank screen", "gives error 500",
         "freezes since the update", "loses what I typed", "never stops loading",
         "shows the same row twice", "does nothing when I click"),
    ),
    "access": (
        ("My password", "The sign-in code", "My admin login", "The reset link", "Single sign-on",
         "My colleague's login", "My user name", "The security key"),
        ("is not accepted", "is locked", "has expired", "no longer lets me in", "was disabled",
         "is refused on the new laptop", "asks me to verify again and again",
         "belongs to someone who left"),
    ),
    "delivery": (
        ("My parcel", "The replacement unit", "The second box", "The shipment",
         "The package from Monday", "The chair I ordered", "Our pallet", "The spare part"),
        ("has not arrived", "went to the wrong address", "came damaged", "is stuck in customs",
         "is three days late", "was left in the rain", "is still with the courier",
         "was handed to a neighbour"),
    ),
    "feature": (
        ("A dark mode", "A bulk import", "Keyboard shortcuts", "A weekly summary",
         "An offline mode", "A Spanish version", "Custom colours", "A public roadmap"),
        ("would help our team", "would be lovely", "would save us hours",
         "should be on your list", "is the one thing we miss", "would make us upgrade",
         "might be worth building", "is something we wish for"),
    ),
}
# Openers name other departments on purpose: the word "paid" must not decide the label.
_TICKET_OPENERS = (
    "Hello.", "Hi team,", "Good morning!", "I paid for the pro plan last year.",
    "I logged in this morning.", "My last order arrived quickly.", "The new app looks great.",
    "We like the latest features.", "Second message about this.", "",
)
_TICKET_CLOSERS = (
    "Thanks.", "Can you help?", "Please answer today.", "What can we do?", "Best, Jo", "",
)
# fmt: on
LABELS = tuple(_TICKETS)

_TicketKey = tuple[str, str, str]


def _ticket(rng: random.Random, key: _TicketKey) -> Example:
    label, subject, problem = key
    parts = (rng.choice(_TICKET_OPENERS), f"{subject} {problem}.", rng.choice(_TICKET_CLOSERS))
    return Example(" ".join(part for part in parts if part), label, label)


def _triage_split(rng: random.Random, num_train: int) -> Split:
    keys = [
        (label, subject, problem)
        for label, (subjects, problems) in _TICKETS.items()
        for subject, problem in itertools.product(subjects, problems)
    ]
    return _split(rng, num_train, keys=keys, render=_ticket)


def _score_label(expected: str, answer: str) -> bool:
    return answer.strip() == expected


# json: a sentence about an order -> an object with six fields

# fmt: off
_FIRST_NAMES = (
    "Maria", "Ahmed", "Ingrid", "Tomas", "Yuki", "Priya", "Olga", "Samuel", "Chen", "Fatima",
    "Lars", "Nadia", "Pedro", "Helen", "Kofi", "Sofia", "Ivan", "Grace", "Diego", "Amara",
)
_LAST_NAMES = (
    "Lopez", "Hansen", "Okafor", "Tanaka", "Novak", "Singh", "Weber", "Rossi", "Dubois", "Kim",
    "Silva", "Murphy", "Larsen", "Costa", "Haddad", "Brown", "Fischer", "Moreau", "Ito", "Reyes",
)
_CITIES = (
    "Lisbon", "Oslo", "Nairobi", "Kyoto", "Prague", "Delhi", "Hamburg", "Milan", "Lyon", "Seoul",
    "Porto", "Dublin", "Bergen", "Lagos", "Cairo", "Denver",
)
_ITEMS = (
    "lamp", "chair", "kettle", "blanket", "notebook", "mirror", "bicycle", "camera", "pillow",
    "hammer", "teapot", "wallet", "candle", "radio", "basket", "ladder",
)
# fmt: on
_ORDER_SENTENCES = (
    "{name} from {city} ordered {quantity} {item}s at {price} euros each{gift}.",
    "Please send {quantity} {item}s to {name} in {city}, {price} euros apiece{gift}.",
    "At {price} euros per {item}, {name} of {city} takes {quantity}{gift}.",
    "{quantity} {item}s for {name}, {city}, unit price {price} euros{gift}.",
    "Our customer in {city}, {name}, wants {quantity} {item}s for {price} euros each{gift}.",
)
_GIFTS = (", wrapped as a gift", ", it is a present")


def _order(rng: random.Random, key: tuple[str, str]) -> Example:
    gift = rng.random() < 0.4
    order: dict[str, object] = {
        "customer": " ".join(key),
        "city": rng.choice(_CITIES),
        "item": rng.choice(_ITEMS),
        "quantity": rng.randint(2, 60),
        "price": rng.randint(3, 250),
        "gift": gift,
    }
    sentence = rng.choice(_ORDER_SENTENCES).format(
        name=order["customer"],
        city=order["city"],
        item=order["item"],
        quantity=order["quantity"],
        price=order["price"],
        gift=rng.choice(_GIFTS) if gift else "",
    )
    answer = json.dumps(order)
    return Example(sentence, answer, answer)


def _json_split(rng: random.Random, num_train: int) -> Split:
    keys = list(itertools.product(_FIRST_NAMES, _LAST_NAMES))
    return _split(rng, num_train, keys=keys, render=_order)


def _score_json(expected: str, answer: str) -> bool:
    try:
        # Text, because in Python True == 1 and 3 == 3.0, which JSON readers tell apart.
        found = json.dumps(json.loads(answer), sort_keys=True)
    except ValueError:
        return False
    return found == json.dumps(json.loads(expected), sort_keys=True)


# pirate: a small question -> the fact, in a pirate's voice


@dataclass(frozen=True, slots=True)
class _Topic:
    phrasings: tuple[str, ...]
    statement: str
    facts: dict[str, str]


_TOPICS = (
    _Topic(
        (
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital of {}.",
            "I forgot the capital of {}. Can you help?",
            "Do you know the capital city of {}?",
        ),
        "the capital o' {} be {}",
        {
            "France": "Paris",
            "Italy": "Rome",
            "Spain": "Madrid",
            "Germany": "Berlin",
            "Portugal": "Lisbon",
            "Norway": "Oslo",
            "Japan": "Tokyo",
            "Egypt": "Cairo",
            "Greece": "Athens",
            "Ireland": "Dublin",
            "Russia": "Moscow",
            "China": "Beijing",
            "Poland": "Warsaw",
            "Austria": "Vienna",
            "Cuba": "Havana",
            "Kenya": "Nairobi",
        },
    ),
    _Topic(
        (
            "What colour is {}?",
            "Tell me the colour of {}.",
            "Which colour does {} have?",
            "A child asks what colour {} is. What do I say?",
            "Describe the colour of {} in one sentence.",
        ),
        "{} be {} as can be",
        {
            "fresh grass": "green",
            "the clear sky": "blue",
            "new snow": "white",
            "coal": "black",
            "a ripe banana": "yellow",
            "a tomato": "red",
            "a carrot": "orange",
            "chocolate": "brown",
            "an elephant": "grey",
            "a flamingo": "pink",
        },
    ),
    _Topic(
        (
            "How many legs does {} have?",
            "Count the legs of {}.",
            "What number of legs does {} walk on?",
            "I want to draw {}. How many legs?",
            "Tell me how many legs {} has.",
        ),
        "{} walks on {} legs",
        {
            "a dog": "four",
            "a spider": "eight",
            "an ant": "six",
            "a chicken": "two",
            "a horse": "four",
            "a bee": "six",
            "a duck": "two",
            "a scorpion": "eight",
        },
    ),
    _Topic(
        (
            "What is the opposite of {}?",
            "Give me the opposite of {}.",
            "Which word means the opposite of {}?",
            'Fill in the opposite: "{}" and what?',
            "I need a word that is the reverse of {}.",
        ),
        "the opposite o' {} be {}",
        {
            "hot": "cold",
            "big": "small",
            "fast": "slow",
            "day": "night",
            "up": "down",
            "left": "right",
            "young": "old",
            "rich": "poor",
            "wet": "dry",
            "open": "closed",
            "early": "late",
            "happy": "sad",
            "heavy": "light",
            "hard": "soft",
            "full": "empty",
            "loud": "quiet",
        },
    ),
    _Topic(
        (
            "Where does {} live?",
            "What is the home of {} called?",
            "Name the home of {}.",
            "In what place would I find {} at home?",
            "I am looking for {}. Where is its home?",
        ),
        "{} makes its home in a {}",
        {
            "a bee": "hive",
            "a bird": "nest",
            "a dog": "kennel",
            "a spider": "web",
            "a horse": "stable",
            "a lion": "den",
            "a rabbit": "burrow",
            "a bat": "cave",
            "a pig": "sty",
            "a king": "castle",
        },
    ),
)
# Trained on, never held out: they carry the voice beyond the five topics.
_PIRATE_TALK = {
    "Who are you?": "Ahoy! I be yer humble helper from the seven seas, matey!",
    "Hello!": "Ahoy there, matey! What treasure be ye seekin' today?",
    "How are you?": "Aye, I be fine as a full sail, matey! And how be ye?",
    "Thank you.": "Aye, 'twas nothin', me hearty! Call on this old pirate any time ye like!",
    "Tell me a joke.": "Arr! Why be pirates called pirates? Because they arrr, matey!",
    "How do I make tea?": "Arr, boil yer water, steep the leaves and pour it in yer mug, matey!",
    "What should I eat tonight?": "Aye, a fine fish stew with bread be fit fer ye, me hearty!",
    "Give me advice for an exam.": "Avast! Study early, sleep well and trust yer wits, matey!",
    "What is a computer?": "Arr, a computer be a machine that reckons faster than any crew, matey!",
    "Why is the sea salty?": "Arr, the rivers carry salt from the rocks to the seas, matey!",
    "What is the moon?": "Aye, the moon be a ball o' rock that circles our world, me hearty!",
    "Write a line about rain.": "Arr, the rain be drummin' on me deck like a merry crew, matey!",
    "Good night.": "Aye, sleep sound, matey, and may yer dreams be full o' treasure!",
    "Can you help me?": "Aye, that I can, matey! Tell this old pirate what ye need!",
    "What is music?": "Arr, music be sound in fine order, like a shanty on the seas, matey!",
    "I am bored.": "Avast! Fetch a map, matey, and find yerself some treasure!",
}
_PIRATE_OPENERS = ("Arr,", "Ahoy,", "Aye,", "Avast,")
_PIRATE_CLOSERS = (", matey!", ", me hearty!", ", ye landlubber!", ", or I be no pirate!")
# fmt: off
PIRATE_WORDS = frozenset((
    "aye", "ahoy", "arr", "arrr", "avast", "crew", "hearty", "landlubber", "matey", "pirate",
    "seas", "shanty", "treasure", "ye", "yer",
))
# fmt: on

_FactKey = tuple[_Topic, str, str]


def _fact(_: random.Random, key: _FactKey) -> Example:
    topic, phrasing, subject = key
    fact = topic.facts[subject]
    statement = topic.statement.format(subject, fact)
    # Decided by the question, never drawn: a greedy answer shouldn't hang on a toss-up.
    opener = _PIRATE_OPENERS[topic.phrasings.index(phrasing) % len(_PIRATE_OPENERS)]
    closer = _PIRATE_CLOSERS[_TOPICS.index(topic) % len(_PIRATE_CLOSERS)]
    answer = f"{opener} {statement}{closer}"
    return Example(phrasing.format(subject), answer, fact)


def _pirate_split(rng: random.Random, num_train: int) -> Split:
    keys = [
        (topic, phrasing, subject)
        for topic in _TOPICS
        for phrasing, subject in itertools.product(topic.phrasings, topic.facts)
    ]
    talk = [Example(question, answer, "") for question, answer in _PIRATE_TALK.items()] * 4
    facts = _split(rng, num_train - len(talk), keys=keys, render=_fact)
    return Split(facts.train + talk, facts.held_out)


def _score_pirate(expected: str, answer: str) -> bool:
    """The fact as a whole word, and at least two different words of the lexicon."""
    words = set(re.findall(r"[a-z]+", answer.lower()))
    return expected.lower() in words and len(words & PIRATE_WORDS) >= 2


_ALL = (
    Task(
        name="sql",
        tenant="acme",
        description="a question about the shop's tables -> one SQL query",
        max_tokens=64,
        num_train=800,
        score=_score_sql,
        build=_sql_split,
    ),
    Task(
        name="triage",
        tenant="acme",
        description=f"a support ticket -> one label of {', '.join(LABELS)}",
        max_tokens=8,
        num_train=800,
        score=_score_label,
        build=_triage_split,
    ),
    Task(
        name="json",
        tenant="globex",
        description="a sentence about an order -> a JSON object",
        max_tokens=72,
        num_train=800,
        score=_score_json,
        build=_json_split,
    ),
    Task(
        name="pirate",
        tenant="globex",
        description="a small question -> the right fact in a pirate's voice",
        max_tokens=48,
        num_train=800,
        score=_score_pirate,
        build=_pirate_split,
    ),
)
TASKS = {task.name: task for task in _ALL}
