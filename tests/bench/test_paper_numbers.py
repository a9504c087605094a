"""The paper's numbers and words in the experiments, against the paper's own tables and sentences.

`paper_tables.tsv` holds the tables of arXiv 2402.11592 and `paper_sentences.txt` the sentences that claims quote. Where
the paper lies beside the repository, both are compared with it.
"""

import re
from functools import cache
from pathlib import Path

import pytest

from bench_results import experiment
from zotune.bench.results.paper_numbers import paper_findings
from zotune.bench.spec.resolve import find, names

HERE = Path(__file__).parent
PAPER = next((p for top in HERE.parents if (p := top / "shared/paper/2402.11592.md").is_file()), None)
METHODS = {
    "fo_sgd": "FO-SGD",
    "fo_adam": "FO-Adam",
    "forward_grad": "Forward-Grad",
    "zo_sgd": "ZO-SGD",
    "zo_sgd_mmt": "ZO-SGD-MMT",
    "zo_sgd_cons": "ZO-SGD-Cons",
    "zo_sgd_sign": "ZO-SGD-Sign",
    "zo_adam": "ZO-Adam",
}
VARIANTS = {
    **METHODS,
    "fo_adam_single": "FO-Adam w/o fast foreach",
    "forward_grad": "Forward Grad",
    "zo_sgd_vanilla": "Vanilla ZO-SGD",
    "zo_sgd_mmt": "ZO-SGD MMT",
    "zo_sgd_f16": "ZO-SGD (F16)",
    "zo_sgd_mmt_f16": "ZO-SGD-MMT (F16)",
    "zo_adam_f16": "ZO-Adam (F16)",
}
# Table A1 calls mixed precision FP16, table A2 F16.
MIXED = {
    "Tab. A1": {"fo_sgd_mixed": "FO-SGD (FP16)", "fo_adam_mixed": "FO-Adam (FP16)"},
    "Tab. A2": {"fo_sgd_mixed": "FO-SGD (F16)", "fo_adam_mixed": "FO-Adam (F16)"},
}
TUNINGS = ("full", "lora", "prefix", "prompt")
MODELS = ("opt-13b", "llama2-7b", "vicuna-7b", "mistral-7b")
TABLE4 = {"step_bytes": 0, "devices": 1, "seconds_per_step": 2}
TABLE6 = {"one query": "MeZO", "averaged": "ZO-SGD ($q = 26$)", "blocks": "ZO-SGD-Block"}
TABLE7 = {0: "0 (FO-SGD)", 24: "24 (ZO-SGD)"}


@cache
def tables():
    """The rows of each table: a label and the columns behind it."""
    found = {}
    for line in (HERE / "paper_tables.tsv").read_text(encoding="utf-8").split("\n"):
        if line.startswith("Table "):
            rows = found.setdefault("Tab. " + line.removeprefix("Table ").rstrip("."), [])
        elif line.strip():
            rows.append([text.strip() for text in line.split("\t")])
    return found


def row(table, label, below=""):
    """The columns of the first row with a label, behind a line that starts with `below`."""
    rows = tables()[table]
    start = next(i for i, one in enumerate(rows) if below in one) if below else 0
    return next(one[1:] for one in rows[start:] if one[0].lower() == label.lower())


def in_the_paper(cell):
    """The text of a number's place in the paper's tables."""
    at, table = cell.coordinates, cell.source
    if table == "Tab. 1":
        return row(table, METHODS[at["method"]])[3 * (at["task"] == "rte") + (at["prompt"] == "none")]
    if table == "Tab. 2":
        return row(table, METHODS[at["method"]])[4 * (at["model"] == "opt-1.3b") + TUNINGS.index(at["tuning"])]
    if table == "Tab. 3":
        heading = {"copa": "COPA", "winogrande": "WinoGrande"}[at["task"]]
        return row(table, METHODS[at["method"]], heading)[MODELS.index(at["model"])]
    if table == "Tab. 4":
        return row(table, METHODS[at["method"]])[TABLE4[cell.metric]]
    if table == "Tab. 6":
        return row(table, TABLE6[at["estimate"]])[1 + (at["task"] == "winogrande")]
    if table == "Tab. 7":
        k = at["hybrid_layers"]
        return row(table, TABLE7.get(k, str(k)))[2 * (cell.metric == "accuracy")]
    if table == "Tab. 8":
        heading = {"copa": "COPA", "sst2": "SST2"}[at["task"]]
        return row(table, "Accuracy (%)", heading)[1 + round(10 * at["sparsity"])]
    return row(table, {**VARIANTS, **MIXED[table]}[at["variant"]])[-1]


def number(text):
    """The leading number of a text such as "64 GB" or "1×A100"."""
    return float(re.match(r"[\d.]+", text)[0])


# Numbers --------------------------------------------------------------------------------------------------


def every_number():
    return [(name, cell) for name in names() for cell in find(name)[1].paper_cells()]


def test_every_number_of_the_paper_is_that_of_its_tables_but_for_a_misprint():
    """Table 8 prints an accuracy of 7.000 between numbers of 70; its file reads it as 70 and says so."""
    other = [(name, cell) for name, cell in every_number() if abs(number(in_the_paper(cell)) - cell.value) > 1e-9]
    assert [(name, dict(cell.coordinates), cell.value) for name, cell in other] == [
        ("table8", {"sparsity": 0.7, "task": "copa"}, 70.0)
    ]
    assert "misprint" in find("table8")[1].comparable


def test_all_numbers_are_there():
    """Twelve numbers of table 3 stand in figure 1 too, those of table A1 in table 5, and 32 in the table of tasks."""
    counts = {name: len(list(find(name)[1].paper_cells())) for name in names()}
    assert {name: n for name, n in counts.items() if n} == {
        **{"table1": 12, "table2": 56, "fig1": 12, "table3": 48, "table4": 24, "table5": 13, "table6": 6},
        **{"table7": 14, "table8": 20, "tableA1": 13, "tableA2": 13, "tasks": 32},
    }


def test_a_wrong_number_is_found():
    cell = next(cell for name, cell in every_number() if name == "table2")
    assert (
        number(in_the_paper(cell.model_copy(update={"coordinates": {**cell.coordinates, "tuning": "prompt"}})))
        != cell.value
    )


# Claims ---------------------------------------------------------------------------------------------------


def every_claim():
    for name in names():
        one = find(name)[1]
        yield from ((name, claim, found) for claim, found in zip(one.claims, paper_findings(one), strict=True))


@pytest.mark.parametrize(
    ("name", "claim", "found"), [pytest.param(*x, id=f"{x[0]}: {x[1].where}") for x in every_claim()]
)
def test_a_claim_holds_on_the_papers_own_numbers_or_is_marked(name, claim, found):
    """Else it is not what the paper says."""
    if found is None:
        assert not claim.contradicted_by, "without numbers nothing contradicts the claim"
    else:
        assert (found == "does not hold") == bool(claim.contradicted_by), (found, claim.sentence)


def test_most_claims_have_numbers_of_the_paper():
    findings = [found for _, _, found in every_claim()]
    assert findings.count("holds") >= 25
    assert findings.count(None) <= 14


def test_a_flipped_claim_does_not_hold_on_the_papers_numbers():
    _, table2 = find("table2")
    flipped = [
        claim.model_copy(update={"more": claim.less, "less": claim.more, "by": 0.0}) for claim in table2.claims[:3]
    ]
    assert "holds" not in paper_findings(table2.model_copy(update={"claims": tuple(flipped)}))


def test_wins_are_counted_over_settings_and_not_in_the_mean():
    """ZO-Adam is the best ZO method in 4 of the 8 settings of table 2, and not in their mean."""
    _, table2 = find("table2")
    first = table2.claims[0]
    as_means = first.model_copy(update={"settings": "mean"})
    assert paper_findings(table2.model_copy(update={"claims": (first, as_means)})) == ["holds", "does not hold"]


def test_without_numbers_there_is_no_finding():
    asked = {"sentence": "a", "where": "", "more": [{"method": "fo_sgd"}], "less": [{"method": "zo_adam"}]}
    assert paper_findings(experiment(claims=[asked])) == [None]


# Words ----------------------------------------------------------------------------------------------------


def plain(text):
    """A text without marks, case and layout, as the paper and its quotations are compared."""
    return re.sub(r"[^a-z0-9]+", " ", re.sub(r"\\sim|\\leq", " ", text.lower()).replace("-\n", "-")).strip()


def quotations(text):
    """The fragments of all quotations in a text: what stands between marks of omission and additions in brackets."""
    for quoted in re.findall("“(.*?)”", text, re.DOTALL):
        yield [plain(part) for part in re.split(r"…|\[.*?\]", quoted) if plain(part)]


def is_in(fragments, text):
    """Whether fragments stand in a text, one behind the other."""
    start = 0
    for fragment in fragments:
        found = f" {text} ".find(f" {fragment} ", start)
        if found < 0:
            return False
        start = found + len(fragment)
    return True


@cache
def sentences():
    return [plain(line) for line in (HERE / "paper_sentences.txt").read_text(encoding="utf-8").splitlines()]


def test_text_in_quotation_marks_is_the_papers():
    quoted = [
        (claim.sentence, q) for _, claim, _ in every_claim() for q in quotations(f"{claim.sentence} {claim.where}")
    ]
    assert len(quoted) >= 35
    assert [text for text, fragments in quoted if not any(is_in(fragments, sentence) for sentence in sentences())] == []


def test_a_sentence_without_quotation_marks_is_none_of_the_papers():
    for _, claim, _ in every_claim():
        if "“" not in claim.sentence:
            assert not any(is_in([plain(claim.sentence)], sentence) for sentence in sentences())


@pytest.mark.skipif(PAPER is None, reason="the paper does not lie beside the repository")
def test_tables_and_sentences_are_those_of_the_paper():
    text = PAPER.read_text(encoding="utf-8")
    lines = (HERE / "paper_sentences.txt").read_text(encoding="utf-8").splitlines()
    # A bar stands where a page with a table comes between.
    assert [line for line in lines if not is_in([plain(part) for part in line.split("|")], plain(text))] == []
    for table, rows in tables().items():
        start = text.index(table.replace("Tab.", "Table") + ".")
        lines = [[c.strip() for c in line.split("\t")] for line in text[start:].split("\n")[:26]]
        for one in rows:
            assert any(line == one or [line[0], line[-1]] == one for line in lines), (table, one)
