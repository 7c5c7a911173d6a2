"""The answer to a target, `Recommendation`, as a value and as text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypedDict

from scaling.advice.comparison import PublishedComparison, format_comparison
from scaling.advice.flags import Flag, format_loss
from scaling.advice.next_run import NextRun, NextRunNote, Sweep
from scaling.common.quantities import format_count

INTERVAL_FIELDS = ("lr_interval", "batch_interval", "loss_interval", "N_interval", "D_interval")
UNTRUSTED = "NOT TO BE TRUSTED"
# Of printed lines, in columns.
LINE_WIDTH = 80
# Caveats that the short text shows, and lines of each.
MAX_CAVEATS, CAVEAT_LINES = 3, 2
# Flags from the worst to the mildest, by the beginning of their code. Serious ones come first all the same.
SEVERITY = (
    "no-answer", "mixed", "beyond-N", "beyond-D", "beyond-C", "below", "few", "loss-evidence", "optimum", "lr-un",
    "batch_tokens-un", "lr-wide", "measured", "loss-fit", "forms", "hp-settings", "batch-beyond", "lr-edge",
    "batch_tokens-edge", "hp-empty", "hp-fit", "next-run",
)  # fmt: skip


class RecommendationProvenance(TypedDict, total=False):
    """Which runs a recommendation is based on. Older notes lack some of the keys.

    Attributes:
        run_ids: Number of distinct runs.
        run_ids_sha256: SHA-256 of their sorted run ids.
        data_sha256: SHA-256 of the numbers that the laws were fitted to.
        table_sha256: SHA-256 of the usable proxies of the table, see `scaling.runs.table.hash_table`.
        n_runs: Number of rows that the laws were fitted to.
        n_diverged: Rows left out because the run diverged.
        n_without_result: Rows left out because they hold no loss, such as runs that never started.
        n_excluded: Rows left out for other reasons.
        n_far: Rows left out because they are far above the best of their group.
        n_groups: Number of (N, D) groups.
        version: The version of muscale.
        N_convention: How N was counted, a value of `scaling.advice.flags.CONVENTIONS`.
    """

    run_ids: int
    run_ids_sha256: str
    data_sha256: str
    table_sha256: str
    n_runs: int
    n_diverged: int
    n_without_result: int
    n_excluded: int
    n_far: int
    n_groups: int
    version: str
    N_convention: str


class LossLawValues(TypedDict):
    """The fitted loss law L = E + A / N^alpha + B / D^beta in nats per token, and "ok" or what is doubtful."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    status: str


class HPLawValues(TypedDict):
    """The fitted law of learning rate and batch, each a power of N and D, and "ok" or what is doubtful."""

    lr_coef: float
    lr_N: float
    lr_D: float
    batch_coef: float
    batch_N: float
    batch_D: float
    status: str


class OptimalSize(TypedDict):
    """The N and D of least predicted loss at the compute of the target, with their intervals."""

    N: float
    D: float
    N_interval: list[float]
    D_interval: list[float]


class PredictionNote(TypedDict):
    """What was predicted of a target before it was trained."""

    loss: float
    loss_interval: list[float]
    mass: float


@dataclass(frozen=True)
class Recommendation:
    """What to run at (N, D), which loss to expect, and what this is based on.

    Printing it shows the answer in short, and `explain` all of it. `to_dict` and `from_dict` convert it to plain JSON
    values and back.

    Attributes:
        N: Parameters that multiply tokens, unless the provenance says otherwise.
        D: Training tokens.
        C: Training compute 6 N D, FLOPs.
        lr: Peak learning rate, at base width under muP. None if the table does not tell, see `not_measured`.
        lr_interval: Its interval; None if its best value is not measured.
        batch_tokens: Tokens per optimizer step, not clipped to the searched range; None if the table does not tell.
        batch_interval: Its interval, tokens per step; None if its best value is not measured.
        batch_seqs: Sequences per optimizer step, rounded; None if the sequence length of the runs is not known.
        seq_len: The sequence length of the runs, tokens; None if it was not recorded or differs.
        loss: Expected loss of a run with these settings, nats per token.
        loss_interval: The interval of one new run, nats per token.
        mass: The probability that each interval holds.
        expected_regret: Loss that is lost because the best lr and batch are not known exactly, as a share of the loss;
            an upper bound. None if either was not varied.
        flags: Reasons to doubt this. If any of them is serious, do not trust the recommendation.
        provenance: Which runs it is based on.
        loss_law: The fitted loss law.
        hp_law: The fitted law of learning rate and batch; None if neither was varied.
        N_interval: The interval of the compute-optimal N; None if N and D were given.
        D_interval: The interval of the compute-optimal D, tokens; None if N and D were given.
        next_run: What to run next, as JSON keeps a `scaling.advice.next_run.NextRun`; None if it was not asked for.
        beside: What published laws give at (N, D). Not kept in notes.
        run_ids: The runs that the laws were fitted to. Not kept in notes.
        optimum: The compute-optimal N and D at the compute of the target; None if the runs do not bound them.
        not_measured: Why the best value of "lr" or "batch_tokens" is not known, such as "not in this table". A value
            that all runs share is still in `lr` or `batch_tokens`, without an interval.
        refit: Whether the target has been trained already. Its own runs are not among those that laws were fitted to.
        prediction: What was predicted before the target was trained; None if that was not recorded.
        measured: The measured final loss of each arm of the target, nats per token.
    """

    N: float
    D: float
    C: float
    lr: float | None
    lr_interval: tuple[float, float] | None
    batch_tokens: float | None
    batch_interval: tuple[float, float] | None
    batch_seqs: int | None
    seq_len: int | None
    loss: float
    loss_interval: tuple[float, float]
    mass: float
    expected_regret: float | None
    flags: tuple[Flag, ...]
    provenance: RecommendationProvenance
    loss_law: LossLawValues
    hp_law: HPLawValues | None
    # The fields below are missing in older notes.
    N_interval: tuple[float, float] | None = None
    D_interval: tuple[float, float] | None = None
    next_run: NextRunNote | None = None
    beside: tuple[PublishedComparison, ...] = ()
    run_ids: tuple[str, ...] = ()
    optimum: OptimalSize | None = None
    not_measured: Mapping[str, str] = field(default_factory=dict)
    refit: bool = False
    prediction: PredictionNote | None = None
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def trustworthy(self) -> bool:
        """Whether no flag is serious."""
        return not any(f.serious for f in self.flags)

    @property
    def has_loss(self) -> bool:
        """Whether the loss is an answer, and not a number far beyond all losses of the runs."""
        return not any(f.code == "no-answer" for f in self.flags)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, from which `from_dict` makes the same recommendation again."""
        plain = asdict(self) | {"trustworthy": self.trustworthy}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recommendation:
        """Return the recommendation that `to_dict` converted.

        Args:
            plain: JSON values, also from an earlier or later version: missing fields get their defaults, unknown ones
                are ignored.
        """
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in plain.items() if k in known}
        for name in INTERVAL_FIELDS:
            if values.get(name) is not None:
                values[name] = (float(values[name][0]), float(values[name][1]))
        flag_fields = {f.name for f in fields(Flag)}
        values["flags"] = tuple(Flag(**{k: v for k, v in f.items() if k in flag_fields}) for f in values["flags"])
        for name in ("beside", "run_ids"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)

    def __str__(self) -> str:
        rows = [*self.list_loss_rows(), *self.list_optimum_rows()]
        lines = [wrap(self.verdict, 0), "", *self._format_table([*self.list_setting_rows(), *rows])]
        caveats = choose_caveats(self.flags)
        if caveats:
            lines += ["", "Caveats, the worst first:" if len(caveats) > 1 else "Caveat:"]
            lines += [wrap(f"  - {text}", 4) for text in caveats]
        return "\n".join(lines)

    def explain(self) -> str:
        """Return all of the recommendation as text: every warning, the laws, their runs and what to run next."""
        flags = sort_flags(self.flags)
        rows = [*self.list_setting_rows(), *self.list_loss_rows(), *self.list_optimum_rows()]
        if self.expected_regret is not None:
            rows.append(("expected regret", f"{100 * self.expected_regret:.2f} %", "of the loss; an upper bound"))
        lines = [wrap(self.verdict, 0), "", *self._format_table(rows)]
        lines += ["", wrap(_format_origin(self.provenance), 0), *self._format_laws()]
        if flags:
            lines += ["", "Warnings:"]
            lines += [wrap(f"  {'SERIOUS' if f.serious else 'note'}: {f.text}", 4) for f in flags]
        lines += self.format_additions()
        if self.next_run is None and self.not_measured:
            lines += ["", wrap("No next run is proposed: that needs runs with other learning rates and batches.", 2)]
        serious = [f for f in flags if f.serious]
        end = f"{UNTRUSTED} until the serious warnings are resolved." if serious else "No serious warnings."
        return "\n".join([*lines, "", end])

    def format_additions(self) -> list[str]:
        """Return the lines on published laws and on what to run next, as far as these were asked for."""
        lines = []
        if self.beside:
            lines += ["", "Published laws, for comparison only; each has its own setting and its own N:"]
            lines += [wrap(format_comparison(law, self.lr, self.batch_tokens), 18) for law in self.beside]
        if self.next_run is not None:
            lines += ["", "What to run next to narrow this most:", str(parse_next_run(self.next_run))]
        return lines

    @property
    def verdict(self) -> str:
        """The answer in one sentence, or why it cannot be trusted."""
        serious = [f for f in sort_flags(self.flags) if f.serious]
        if serious:
            scope = ""
            if all(f.about_settings for f in serious):
                words = (("lr", "learning rate"), ("batch", "batch"))
                names = [word for code, word in words if any(f.code.startswith(code) for f in serious)]
                scope = f" in its {' and '.join(names or ['settings'])}"
            return f"{UNTRUSTED}{scope}: {split_sentences(serious[0].short or serious[0].text)[0]}"
        where = f"at N {format_count(self.N)}, D {format_count(self.D)}"
        loss = f"a loss of {format_loss(self.loss)} nats per token {where}"
        settings = []
        if self.lr is not None:
            settings.append(f"learning rate {self.lr:.3g}")
        if self.batch_tokens is not None:
            settings.append(f"{format_count(self.batch_tokens)} tokens per step")
        if self.refit and self.prediction is not None:
            return f"This target was predicted at {format_loss(self.prediction['loss'])}; now the laws expect {loss}."
        if settings and len(self.not_measured) < 2:
            return f"Use {' and '.join(settings)}, and expect {loss}."
        return f"Expect {loss}."

    def list_setting_rows(self) -> list[tuple[str, str, str]]:
        """Return the rows (name, value, interval or remark) of the learning rate and the batch."""
        rows = []
        for name, label, value, interval in (
            ("lr", "learning rate", self.lr, self.lr_interval),
            ("batch_tokens", "batch, tokens per step", self.batch_tokens, self.batch_interval),
        ):
            show = format_rate if name == "lr" else format_tokens
            remark = self.not_measured.get(name, "")
            if interval is not None:
                remark = f"{show(interval[0])} to {show(interval[1])}"
            rows.append((label, "-" if value is None else show(value), remark))
        if self.batch_seqs is not None:
            rows.append((f"  in sequences of {self.seq_len:,}", f"{self.batch_seqs:,}", ""))
        return rows

    def list_loss_rows(self) -> list[tuple[str, str, str]]:
        """Return the rows (name, value, interval) of the loss: as predicted, measured and fitted since."""
        current = ("no answer", "")
        if self.has_loss:
            current = (format_loss(self.loss), _format_losses(self.loss_interval))
        ends: Sequence[float] = self.loss_interval
        rows = [("loss, nats per token", *current)]
        if self.prediction is not None:
            ends = self.prediction["loss_interval"]
            rows = [("loss, predicted before", format_loss(self.prediction["loss"]), _format_losses(ends))]
        for arm, loss in self.measured.items():
            held = "inside" if ends[0] <= loss <= ends[1] else "outside"
            rows.append((f"  measured, {arm}", format_loss(loss), f"{held} the predicted interval"))
        if self.prediction is not None:
            rows.append(("  refit without it", *current))
        return rows

    def list_optimum_rows(self) -> list[tuple[str, str, str]]:
        """Return the rows (name, value, interval) of the compute-optimal size."""
        if self.optimum is None:
            if self.N_interval is not None:
                return [("compute-optimal N", format_count(self.N), "no interval")]
            # Older notes lack it, too.
            return [("compute-optimal N", "-", "not bounded by these runs")]
        low, high = self.optimum["N_interval"]
        interval = f"{format_count(low)} to {format_count(high)}"
        rows = [("compute-optimal N", format_count(self.optimum["N"]), interval)]
        if self.D_interval is not None:
            low, high = self.D_interval
            rows.append(("compute-optimal D", format_count(self.D), f"{format_count(low)} to {format_count(high)}"))
        return rows

    def _format_table(self, rows: Sequence[tuple[str, str, str]]) -> list[str]:
        """Return the title and the table, one line per row."""
        head = ("", "estimate" if self.trustworthy else "untrusted", f"{100 * self.mass:.0f} % interval")
        what = "Refit" if self.refit else "Answer"
        title = f"{what} for N = {format_tokens(self.N)}, D = {format_tokens(self.D)} ({self.C:.3g} FLOPs)"
        return [title, *(f"  {name:25}{value:>14}   {text}".rstrip() for name, value, text in [head, *rows])]

    def _format_laws(self) -> list[str]:
        law, hp = self.loss_law, self.hp_law
        lines = [
            f"Loss law: {law['E']:.4g} + {law['A']:.4g} / N^{law['alpha']:.3f} + {law['B']:.4g} / D^{law['beta']:.3f}"
        ]
        if hp is not None and "lr" not in self.not_measured:
            lines.append(f"Learning rate: {hp['lr_coef']:.4g} N^{hp['lr_N']:+.3f} D^{hp['lr_D']:+.3f}")
        if hp is not None and "batch_tokens" not in self.not_measured:
            lines.append(f"Batch: {hp['batch_coef']:.4g} N^{hp['batch_N']:+.3f} D^{hp['batch_D']:+.3f}")
        return lines


def sort_flags(flags: Sequence[Flag]) -> list[Flag]:
    """Return flags from the worst to the mildest."""

    def rank(flag: Flag) -> tuple[bool, int]:
        places = [i for i, code in enumerate(SEVERITY) if flag.code.startswith(code)]
        return not flag.serious, places[0] if places else len(SEVERITY)

    return sorted(flags, key=rank)


def choose_caveats(flags: Sequence[Flag]) -> list[str]:
    """Return the worst caveats, each in at most two lines of a terminal.

    What another caveat says already is left out, and of the first serious flag the sentence that the verdict shows.
    """
    ordered = sort_flags(flags)
    codes = {f.code for f in ordered}
    caveats = []
    for flag in _drop_repeated_distances(ordered):
        text = flag.short or flag.text
        if flag.code == "hp-fit" and codes & {"lr-unidentified", "batch_tokens-unidentified"}:
            continue
        is_in_verdict = flag.serious and flag is ordered[0]
        if is_in_verdict:
            text = " ".join(split_sentences(text)[1:])
        if text:
            caveats.append(shorten(f"SERIOUS: {text}" if flag.serious and not is_in_verdict else text))
    return caveats[:MAX_CAVEATS]


def _drop_repeated_distances(ordered: Sequence[Flag]) -> list[Flag]:
    """Return flags without those on the target's N, D and compute that another one of them sums up."""
    distances = [f for f in ordered if f.code.startswith("beyond-")]
    # The short text on compute names all three distances.
    summary = [f for f in distances if f.code == "beyond-C"]
    serious = [f for f in distances if f.serious]
    kept = distances
    if summary and (not serious or summary[0].serious):
        kept = [*summary, *(f for f in serious if f is ordered[0])]
    elif serious:
        kept = serious
    return [f for f in ordered if f not in distances or f in kept]


def shorten(text: str) -> str:
    """Return the sentences of a text that fit in a caveat; of a long first sentence its beginning."""

    def fits(candidate: str) -> bool:
        return len(wrap(f"  - {candidate}", 4).splitlines()) <= CAVEAT_LINES

    kept = ""
    for sentence in split_sentences(text):
        longer = f"{kept} {sentence}".strip()
        if not fits(longer):
            break
        kept = longer
    if kept:
        return kept
    words = text.split()
    while not fits(" ".join(words) + " ..."):
        words.pop()
    return " ".join(words) + " ..."


def format_rate(value: float) -> str:
    """Return a learning rate as text."""
    return f"{value:.4g}"


def format_tokens(value: float) -> str:
    """Return a number of tokens or parameters in full or, where that is absurd, with a power of ten."""
    return f"{value:,.0f}" if 1 <= value < 1e15 else f"{value:.3g}"


def parse_next_run(note: Mapping[str, Any]) -> NextRun:
    """Return the `NextRun` that a recommendation keeps as JSON values."""
    own: dict[str, Any]
    sweep: dict[str, Any]
    own, sweep = ({k: tuple(v) if isinstance(v, list) else v for k, v in d.items()} for d in (note, note["sweep"]))
    return NextRun(**own | {"sweep": Sweep(**sweep)})


def wrap(text: str, indent: int) -> str:
    """Wrap text to LINE_WIDTH, with so many spaces before all lines but the first."""
    return textwrap.fill(
        text, LINE_WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text."""
    return re.split(r"(?<=[.?!]) (?=[A-Za-z0-9])", text)


def _format_losses(interval: Sequence[float]) -> str:
    return f"{format_loss(interval[0])} to {format_loss(interval[1])}"


def _format_origin(provenance: RecommendationProvenance) -> str:
    """Return in a sentence which runs a recommendation is based on."""
    reasons = (
        (provenance.get("n_diverged", 0), "diverged"),
        (provenance.get("n_without_result", 0), "without a result"),
        (provenance.get("n_excluded", 0), "excluded otherwise"),
        (provenance.get("n_far", 0), "far above the best of their group"),
    )
    left_out = ", ".join(f"{count} {reason}" for count, reason in reasons if count)
    data = (
        f" Data {provenance['data_sha256'][:12]}, muscale {provenance['version']}."
        if "data_sha256" in provenance
        else ""
    )
    return (
        f"Based on {provenance['n_runs']} runs in {provenance['n_groups']} groups of equal N and D"
        f"{f' (left out: {left_out})' if left_out else ''}.{data}"
    )
