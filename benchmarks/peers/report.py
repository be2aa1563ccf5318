"""Say what was measured: tables in Markdown, and a plot.

    python -m benchmarks.peers.report benchmarks/results/peers.json \
      --markdown benchmarks/results/peers.md --plot benchmarks/results/peers.svg

Runs that were dropped do not count. Knows the file's rows and nothing of how they were made.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.figures import Figure, figure
from benchmarks.peers.plot import Bar, Panel, draw
from benchmarks.peers.results import read

OURS = "manylora"
TIMES = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
# At which concurrency times are shown; that of the middle is enough to compare by.
TIMES_AT = 8
MIX_TITLES = {
    "base": "the base model alone",
    "even": "{} adapters, all equally often",
    "zipf": "{} adapters, by Zipf 1.0",
}


@dataclass(frozen=True, slots=True, order=True)
class Load:
    """What was asked for: of how many adapters, and how they were drawn."""

    adapters: int
    mix: str

    @property
    def title(self) -> str:
        return MIX_TITLES[self.mix].format(self.adapters)


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    title: str
    versions: Mapping[str, str]

    @property
    def is_ours(self) -> bool:
        return self.name.split("-")[0] == OURS


class Report:
    """All sessions of a file together."""

    def __init__(self, sessions: Sequence[Mapping[str, Any]]) -> None:
        self._sessions = sessions
        self._runs = [
            {**run, "session": number}
            for number, session in enumerate(sessions)
            for run in session["runs"]
        ]
        self.peers = list(_known_peers(sessions))
        self.concurrencies = sorted({run["concurrency"] for run in self._runs})
        self.loads = sorted({Load(run["adapters"], run["mix"]) for run in self._runs})

    # Figures

    def figure(self, peer: Peer, load: Load, concurrency: int, column: str) -> Figure | None:
        """None where no run counts."""
        values = [run[column] for run in self._counted(peer, load, concurrency)]
        known = [value for value in values if value is not None]
        return figure(known) if known else None

    def advantage(self, peer: Peer, load: Load, concurrency: int) -> Figure | None:
        """Tokens per second of ours over the peer's, of neighbours in a session.

        Ours is what was named first where several were measured.
        """
        theirs = {_place(run): run for run in self._counted(peer, load, concurrency)}
        for ours in (each for each in self.peers if each.is_ours):
            ratios = [
                run["tokens_per_s"] / theirs[_place(run)]["tokens_per_s"]
                for run in self._counted(ours, load, concurrency)
                if _place(run) in theirs
            ]
            if ratios:
                return figure(ratios)
        return None

    def _counted(self, peer: Peer, load: Load, concurrency: int) -> list[dict[str, Any]]:
        return [
            run
            for run in self._runs
            if (run["peer"], run["adapters"], run["mix"], run["concurrency"])
            == (peer.name, load.adapters, load.mix, concurrency)
            and not run["dropped"]
            and not run["errors"]
        ]

    # What else there is to say of a peer

    def _rows(self, kind: str, peer: Peer, adapters: int) -> list[Mapping[str, Any]]:
        return [
            row
            for session in self._sessions
            for row in session[kind]
            if row["peer"] == peer.name and row["adapters"] == adapters
        ]

    def objection(self, peer: Peer, adapters: int) -> str | None:
        """Why there are no figures, or none that count."""
        for row in reversed(self._rows("checks", peer, adapters)):
            if row.get("cannot"):
                return "serves no adapters"
            if "failed" in row:
                return "did not start"
            if row["errors"]:
                return f"failed: {row['errors'][0]}"
            if row["num_of_another"]:
                return (
                    f"wrong: {row['num_of_another']} of {row['num_answers']} answers are another's"
                )
            if not row["is_right"]:
                right = row["num_equal"] + row["num_ties"]
                return f"wrong: {right} of {row['num_answers']} answers are PEFT's"
            return None
        return "not measured"

    def start_s(self, peer: Peer, adapters: int) -> Figure | None:
        starts = [row["start_s"] for row in self._rows("starts", peer, adapters)]
        return figure(starts) if starts else None

    def peak_bytes(self, peer: Peer, adapters: int) -> int | None:
        """The most that its processes held together when it was looked at."""
        held = [row["peak_bytes"] for row in self._rows("starts", peer, adapters)]
        held += [row["bytes"] for row in self._rows("runs", peer, adapters)]
        return max(held, default=None)

    # As text

    def markdown(self) -> str:
        parts = [self._origin()]
        for load in self.loads:
            parts.append(f"### {load.title[0].upper()}{load.title[1:]}\n\n{self._table(load)}")
        return (
            "\n\n".join(
                [
                    *parts,
                    self._cores_table(),
                    self._check_table(),
                    self._peers_table(),
                    self._dropped(),
                ]
            )
            + "\n"
        )

    def _table(self, load: Load) -> str:
        head = ["tokens/s", *(f"at {number}" for number in self.concurrencies)]
        head += [f"ours ÷ this, {number}" for number in self.concurrencies]
        head += [f"first token at {TIMES_AT}, ms: p50, p99", "between tokens, ms: p50, p99"]
        head += ["memory, GiB", "start, s"]
        rows = [
            [peer.title, *self._cells(peer, load)]
            for peer in self.peers
            if self.objection(peer, load.adapters) != "not measured"
        ]
        return _table(head, rows)

    def _cells(self, peer: Peer, load: Load) -> list[str]:
        objection = self.objection(peer, load.adapters)
        num_columns = 2 * len(self.concurrencies)
        if objection is not None:
            return [objection, *[""] * (num_columns + 3)]
        speeds = [self.figure(peer, load, each, "tokens_per_s") for each in self.concurrencies]
        ratios = [
            None if peer.is_ours else self.advantage(peer, load, each)
            for each in self.concurrencies
        ]
        times = [self.figure(peer, load, TIMES_AT, column) for column in TIMES]
        held = self.peak_bytes(peer, load.adapters)
        return [
            *(_shown(speed) for speed in speeds),
            *(_shown(ratio, digits=2) for ratio in ratios),
            *(", ".join(filter(None, map(_brief, pair))) for pair in (times[:2], times[2:])),
            "" if held is None else f"{held / 2**30:.2f}",
            _brief(self.start_s(peer, load.adapters), digits=1),
        ]

    def _cores_table(self) -> str:
        """Of ours, what was named first."""
        ours = next(peer for peer in self.peers if peer.is_ours)
        places = [(load, number) for load in self.loads for number in self.concurrencies]
        runs = {place: self._counted(ours, *place) for place in places}
        names = sorted({name for each in runs.values() for run in each for name in run["cores"]})
        rows = [
            [
                f"{load.title}, {number} at once",
                *(_brief(figure([run["cores"][name] for run in each]), digits=2) for name in names),
            ]
            for (load, number), each in runs.items()
            if each
        ]
        return f"### Cores at work in {ours.title}\n\n" + _table(["load", *names], rows)

    def _check_table(self) -> str:
        head = ["answers of 24 tokens, adapters mixed in a batch", "adapters", "PEFT's, of all"]
        head += ["to the last token", "with a tie called otherwise", "more like another's"]
        head += ["wrong of the base model beside them"]
        rows = []
        for peer in self.peers:
            for adapters in sorted({load.adapters for load in self.loads}):
                for row in self._rows("checks", peer, adapters)[-1:]:
                    if "num_answers" in row:
                        right = row["num_equal"] + row["num_ties"]
                        cells = [row["num_equal"], row["num_ties"], row["num_of_another"]]
                        cells += [row["num_wrong_of_base"]]
                        share = f"{right} of {row['num_answers']}"
                        rows.append([peer.title, adapters, share, *cells])
        return "### Checked against PEFT first\n\n" + _table(head, rows)

    def _peers_table(self) -> str:
        rows = [
            [peer.title, ", ".join(f"{name} {number}" for name, number in peer.versions.items())]
            for peer in self.peers
        ]
        return "### Versions\n\n" + _table(["peer", "versions"], rows)

    def _origin(self) -> str:
        first = self._sessions[0]
        where = first["machine"]
        commits = sorted({session["commit"] for session in self._sessions})
        commands = dict.fromkeys(session["command"] for session in self._sessions)
        shown = "\n".join(commands)
        return (
            f"{where['cpu']}, {where['system']}, Python {where['python']}; Manylora of"
            f" {', '.join(commits)}, begun {first['begun']}. Medians, in brackets their 95 %"
            f" interval and the number of runs (fewer than six: the range).\n\n```sh\n{shown}\n```"
        )

    def _dropped(self) -> str:
        dropped = sum(run["dropped"] for run in self._runs)
        foreign = [run["foreign"] for run in self._runs if not run["dropped"]]
        return (
            f"{dropped} of {len(self._runs)} runs were dropped because other work took part of the"
            f" machine; beside those that count others used {_percent(figure(foreign).median)} of"
            f" the cores (median; at most {_percent(max(foreign))})."
            if foreign
            else "No run counts."
        )

    # As a plot

    def plot(self) -> str:
        return draw(
            [
                Panel(f"{load.title}, {concurrency} at once", self._bars(load, concurrency))
                for concurrency in self.concurrencies
                for load in self.loads
            ],
            columns=len(self.loads),
            unit="tokens/s",
        )

    def _bars(self, load: Load, concurrency: int) -> list[Bar]:
        return [
            Bar(
                peer.title,
                None
                if (objection := self.objection(peer, load.adapters))
                else self.figure(peer, load, concurrency, "tokens_per_s"),
                note=objection or "",
                is_ours=peer.is_ours,
            )
            for peer in self.peers
        ]


def _known_peers(sessions: Iterable[Mapping[str, Any]]) -> Iterable[Peer]:
    found: dict[str, Peer] = {}
    for session in sessions:
        for name, facts in session["peers"].items():
            found[name] = Peer(name, facts["title"], facts["versions"])
    # Ours first, then in the order in which they were measured.
    return sorted(found.values(), key=lambda peer: not peer.is_ours)


def _place(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["session"], run["pair"]


def _shown(number: Figure | None, *, digits: int = 0) -> str:
    if number is None:
        return ""
    median, low, high = (
        _brief(value, digits=digits) for value in (number.median, number.low, number.high)
    )
    return f"{median} ({low} to {high}; {number.number})"


def _brief(number: Figure | float | None, *, digits: int = 0) -> str:
    if number is None:
        return ""
    value = number.median if isinstance(number, Figure) else number
    return f"{value:.{digits}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Say what was measured of peers.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    report = Report(read(options.results))
    if options.markdown is not None:
        options.markdown.write_text(report.markdown())
    else:
        print(report.markdown())
    if options.plot is not None:
        options.plot.write_text(report.plot())


if __name__ == "__main__":
    main()
