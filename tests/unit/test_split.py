from __future__ import annotations

import random
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbr_dist.data.preparation import minhash
from lbr_dist.data.preparation.collect import NO_ENTITY, Numbers, TextDigest, Texts, TextTable
from lbr_dist.data.preparation.components import common_texts, components, merge
from lbr_dist.data.preparation.isolation import Containment, crossings
from lbr_dist.data.preparation.minhash import MIN_WORDS, SketchBlock, Sketches, sketch, word_hashes
from lbr_dist.data.preparation.split import (
    CL,
    EVAL,
    EXTERNAL,
    GL,
    TEXT,
    UNUSED,
    assign,
    parse_sizes,
)
from lbr_dist.data.record import Record, normalise
from lbr_dist.errors import UserError

WORDS = [f"w{i}" for i in range(4000)]
NOTHING = np.zeros(0, np.uint64)


def sentence(rng: random.Random, words: int = 40) -> list[str]:
    return rng.sample(WORDS, words)


def jaccard(a: str, b: str) -> float:
    def shingles(text: str) -> set[tuple[str, ...]]:
        words = normalise(text).split()
        return {tuple(words[i : i + minhash.SHINGLE]) for i in range(len(words) - minhash.SHINGLE + 1)}

    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def table(folder: Path, records: list[Record]) -> tuple[Texts, Sketches]:
    made = TextTable(folder)
    for start in range(0, len(records), 7):  # in batches: they must not matter
        made.append(start, TextDigest.of(records[start : start + 7]))
    return made.finish(), made.sketches


def numbers(records: list[Record], entity: list[int] | None = None, external: set[int] = frozenset()) -> Numbers:
    count = len(records)
    zeros = np.zeros(count, np.uint64)
    return Numbers(
        is_text=np.array([record.is_text for record in records]),
        external=np.array([i in external for i in range(count)]),
        id_hash=zeros,
        content_hash=zeros,
        entity=np.array(entity or [NO_ENTITY] * count, np.uint64),
        order=np.arange(count, dtype=np.uint64),
        part=zeros.astype(np.int64),
        line=zeros.astype(np.int64),
    )


def groups(folder: Path, records: list[Record], entity: list[int] | None = None, common: np.ndarray = NOTHING) -> list:
    texts, sketches = table(folder, records)
    alive = np.ones(len(records), bool)
    return components(texts, numbers(records, entity), sketches, alive=alive, similarity=0.7, common=common).tolist()


def qa(question: str, answer: str) -> Record:
    return Record("", question=question, answer=answer)


def test_words_are_the_same_in_any_company() -> None:
    texts = ["the cat-sat on 2 mats", "", "mats", "naïve “the” mats", "中文字 x", "ไทย"]
    found = word_hashes(texts)
    words = [found.hashes[a:b].tolist() for a, b in pairwise(found.offsets)]
    assert [len(part) for part in words] == [6, 0, 1, 3, 4, 3]
    assert words[0][5] == words[2][0] == words[3][2]
    assert words[0][0] == words[3][1]
    alone = [word_hashes([text]).hashes.tolist() for text in texts]
    assert alone == words
    assert found.counts.tolist() == [6, 0, 1, 3, 2.5, 0.75]


def test_different_words_have_different_hashes() -> None:
    words = [f"{a}{b}{c}" for a in "abcdefghij" for b in "abcdefghij" for c in "0123456789ab"]
    assert len(set(word_hashes([" ".join(words)]).hashes.tolist())) == len(words)
    assert len(set(word_hashes(["ab ba aab aba baa"]).hashes.tolist())) == 5


def test_long_texts_cross_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    texts = [" ".join(sentence(rng)) for _ in range(20)]
    whole = word_hashes(texts)
    monkeypatch.setattr(minhash, "_WORD_CHUNK", 300)
    parts = word_hashes(texts)
    assert all(np.array_equal(getattr(whole, name), getattr(parts, name)) for name in ("hashes", "parts", "offsets"))


def test_estimated_similarity_is_near_the_true_one() -> None:
    rng = random.Random(1)
    errors = []
    for changed in range(0, 30, 2):
        words = sentence(rng, 60)
        other = words.copy()
        for position in rng.sample(range(60), changed):
            other[position] = "new" + str(position)
        a, b = " ".join(words), " ".join(other)
        _, signatures = sketch([a, b])
        errors.append(float((signatures[0] == signatures[1]).mean()) - jaccard(a, b))
    assert max(map(abs, errors)) < 0.15  # 3 standard deviations of 120 hashes are 0.14
    assert abs(np.mean(errors)) < 0.04


def test_short_texts_have_no_sketch() -> None:
    rows, signatures = sketch([" ".join(WORDS[: MIN_WORDS - 1]), " ".join(WORDS[:MIN_WORDS])])
    assert rows.tolist() == [1]
    assert signatures.shape == (1, minhash.HASHES)


def test_marks_end_no_word(tmp_path: Path) -> None:
    assert not len(sketch([normalise("हिन्दी में कितने स्वर होते हैं")])[0])  # six words
    assert not len(sketch([normalise("ยาพาราเซตามอล")])[0])  # thirteen characters of Thai are three words
    spoken = "إِنَّمَا الْأَعْمَالُ بِالنِّيَّاتِ وَإِنَّمَا لِكُلِّ امْرِئٍ مَا نَوَى فَمَنْ كَانَتْ هِجْرَتُهُ"
    written = "".join(letter for letter in spoken if unicodedata.category(letter) != "Mn")
    assert groups(tmp_path, [qa("a", spoken), qa("b", written)]) == [0, 0]


@pytest.mark.parametrize("large_run", [4096, 3])
def test_candidates_find_near_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large_run: int) -> None:
    monkeypatch.setattr(minhash, "LARGE_RUN", large_run)
    rng = random.Random(2)
    texts = []
    for _ in range(60):
        words = sentence(rng)
        texts.append(" ".join(words))
        words[rng.randrange(40)] = "changed"
        texts.append(" ".join(words))  # Jaccard similarity 35/41 = 0.85
    texts += [" ".join(sentence(rng)) for _ in range(200)]
    sketches = Sketches(tmp_path)
    rows = sketches.append(SketchBlock.of(texts))
    sketches.close()
    found = set()
    for a, b in sketches.candidates(rows):
        near = sketches.similar(rows[a], rows[b], 0.7)
        found |= {(min(x, y), max(x, y)) for x, y in zip(a[near].tolist(), b[near].tolist(), strict=True)}
    assert found == {(2 * i, 2 * i + 1) for i in range(60)}


def test_a_template_shared_by_very_many_stays_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minhash, "LARGE_RUN", 50)
    texts = [f"please give the definition of the medical term number w{i} in one short sentence" for i in range(2000)]
    sketches = Sketches(tmp_path)
    rows = sketches.append(SketchBlock.of(texts))
    sketches.close()
    pairs = sum(len(a) for a, _ in sketches.candidates(rows))
    assert pairs < 2000 * 50 * minhash.BANDS * 2


def template(number: int, words: int) -> str:
    """Texts of one form; the fewer words, the less alike."""
    return f"please give the usual dose of w{number} in " + " ".join(f"v{i}" for i in range(words))


@pytest.mark.parametrize("large_run", [8, 4096])
def test_leaving_out_pairs_that_change_nothing_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large_run: int
) -> None:
    monkeypatch.setattr(minhash, "LARGE_RUN", large_run)
    records = [qa(template(i, 2 + i % 9), f"a {i}") for i in range(300)]
    texts, sketches = table(tmp_path, records)
    counted, alive = numbers(records), np.ones(300, bool)
    side = np.random.default_rng(0).choice([GL, GL, GL, CL, EVAL, TEXT, EXTERNAL], 300).astype(np.int8)

    def found() -> tuple[list[int], dict[str, int], list[int]]:
        labels = components(texts, counted, sketches, alive=alive, similarity=0.7, common=NOTHING)
        crossed = crossings(side, texts, sketches, similarity=0.7, common=NOTHING)
        return labels.tolist(), crossed.near, crossed.losers.tolist()

    fewer, real, asked = found(), Sketches.candidates, []
    monkeypatch.setattr(Sketches, "candidates", lambda self, rows, odd: (asked.append(odd), real(self, rows))[1])
    assert fewer == found()
    assert len(asked) == 2
    assert 1 < len(set(fewer[0])) < 300
    assert min(fewer[1].values()) > 0


def test_texts_that_belong_together_already_are_not_compared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [qa(template(i, 30), f"a {i}") for i in range(1500)]
    texts, sketches = table(tmp_path, records)
    compared, real = [], Sketches.candidates

    def counting(self: Sketches, *given: Any) -> Any:
        for pair in real(self, *given):
            compared.append(len(pair[0]))
            yield pair

    monkeypatch.setattr(Sketches, "candidates", counting)
    labels = components(texts, numbers(records), sketches, alive=np.ones(1500, bool), similarity=0.7, common=NOTHING)
    assert not labels.any()
    assert sum(compared) < 50 * 1500  # all pairs: a million, in each band
    assert not len(crossings(np.full(1500, GL, np.int8), texts, sketches, similarity=0.7, common=NOTHING).losers)
    assert sum(compared) < 50 * 1500


def test_the_order_of_records_does_not_change_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minhash, "LARGE_RUN", 4)
    records = [qa(template(i, 7), f"a {i}") for i in range(200)]
    groups_of = []
    for number, order in enumerate((records, random.Random(0).sample(records, 200))):
        texts, sketches = table(tmp_path / str(number), order)
        labels = components(
            texts, numbers(order), sketches, alive=np.ones(200, bool), similarity=0.7, common=NOTHING
        ).tolist()
        together: dict[int, set[str]] = {}
        for record, label in zip(order, labels, strict=True):
            together.setdefault(label, set()).add(str(record.answer))
        groups_of.append(sorted(map(sorted, together.values())))
    assert groups_of[0] == groups_of[1]


def test_merge_joins_chains_and_stars() -> None:
    rng = np.random.default_rng(0)
    count = 300
    a, b = rng.integers(0, count, 200), rng.integers(0, count, 200)
    labels = merge(np.arange(count), a, b)
    parent = list(range(count))

    def root(x: int) -> int:
        while parent[x] != x:
            x = parent[x]
        return x

    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        low, high = sorted((root(x), root(y)))
        parent[high] = low
    assert labels.tolist() == [root(x) for x in range(count)]


def test_components_by_question_answer_near_duplicate_and_entity(tmp_path: Path) -> None:
    rng = random.Random(3)
    words = sentence(rng)
    changed = [*words[:-1], "other"]
    records = [
        qa("What is it?", "first"),
        qa("what is IT", "second"),  # question of 0
        qa("Q3", "Second."),  # answer of 1
        qa("Q4", " ".join(words)),
        qa(" ".join(changed), "fifth"),  # near-duplicate of 3's answer
        qa("Q6", "sixth"),
        qa("Q7", "seventh"),  # entity of 5
        qa("Q8", "eighth"),
        Record("", text="eighth"),  # plain texts link nothing
        Record("", question="Q10", answer="tenth", positives=("Q8",)),
    ]
    entity = [0, 0, 0, 0, 0, 9, 9, 0, 9, 0]
    assert groups(tmp_path, records, entity) == [0, 0, 0, 3, 3, 5, 5, 7, 8, 7]


def test_negatives_do_not_link(tmp_path: Path) -> None:
    records = [Record("", question="a", answer="b", negatives=("d",)), qa("c", "d")]
    assert groups(tmp_path, records) == [0, 1]


class Listed(list):
    """Stands in for the spool."""


def test_common_short_answers_do_not_glue_everything(tmp_path: Path) -> None:
    records = [qa(f"question {i}", ["Yes.", "no"][i % 2]) for i in range(100)]
    records += [qa(f"long {i}", "this answer of seven words links them") for i in range(50)]
    texts, sketches = table(tmp_path, records)
    counted = numbers(records)
    common = common_texts(texts, counted, Listed(records))  # type: ignore[arg-type]
    assert [(text.text, text.records) for text in common] == [("Yes.", 50), ("no", 50)]
    exempt = np.array([text.hash for text in common], np.uint64)
    alive = np.ones(len(records), bool)
    labels = components(texts, counted, sketches, alive=alive, similarity=0.7, common=exempt)
    assert len(set(labels[:100].tolist())) == 100
    assert set(labels[100:].tolist()) == {100}
    side = assign(labels, alive, counted.order, parse_sizes({"gl": "rest", "cl": "50", "eval": "30"}))
    assert np.bincount(side, minlength=6).tolist() == [70, 50, 30, 0, 0, 0]
    assert not len(crossings(side, texts, sketches, similarity=0.7, common=exempt).losers)
    shared = crossings(side, texts, sketches, similarity=0.7, common=NOTHING)
    assert shared.equal["gl - eval"] == 2  # what the exemption lets through, and nothing else


def test_common_answers_are_counted_over_the_records_that_are_there(tmp_path: Path) -> None:
    records = [
        *(Record("", question=f"q {i}", answer="Yes", positives=("yes", "YES.")) for i in range(20)),
        *(qa(f"p {i}", "No") for i in range(21)),
        *(qa(f"other {i}", f"answer {i}") for i in range(1959)),
    ]
    doubled = [*records, *records]
    for given, alive in ((records, len(records)), (doubled, len(records))):
        texts, _ = table(tmp_path / str(len(given)), given)
        present = texts.of(np.arange(len(given)) < alive)  # the others are repetitions
        found = common_texts(present, numbers(given), Listed(given))  # type: ignore[arg-type]
        assert [(text.text, text.records) for text in found] == [("No", 21)]


def test_a_short_question_with_very_many_answers_links_them(tmp_path: Path) -> None:
    """Of a TREC collection's topics each has hundreds of right documents."""
    records = [qa(f"topic {i // 30}", ["yes", f"document {i}"][i % 2]) for i in range(300)]
    texts, sketches = table(tmp_path, records)
    common = common_texts(texts, numbers(records), Listed(records))  # type: ignore[arg-type]
    assert [(text.text, text.records) for text in common] == [("yes", 150)]
    exempt = np.array([text.hash for text in common], np.uint64)
    labels = components(
        texts, numbers(records), sketches, alive=np.ones(300, bool), similarity=0.7, common=exempt
    ).reshape(10, 30)
    assert np.array_equal(labels, np.arange(0, 300, 30)[:, None].repeat(30, 1))
    side = np.where(np.arange(300) == 7, EVAL, GL).astype(np.int8)
    found = crossings(side, texts, sketches, similarity=0.7, common=exempt)
    assert found.equal["gl - eval"] == 1
    assert found.losers.tolist() == [i for i in range(30) if i != 7]


def test_words_of_common_texts_are_counted_in_scripts_without_spaces(tmp_path: Path) -> None:
    records = [qa(f"question {i}", ["是的", "怀孕期间不建议使用,请先咨询医生"][i % 2]) for i in range(60)]
    texts, _ = table(tmp_path, records)
    found = common_texts(texts, numbers(records), Listed(records))  # type: ignore[arg-type]
    assert [text.text for text in found] == ["是的"]


def test_a_molecule_of_one_word_is_no_common_answer(tmp_path: Path) -> None:
    records = [qa(f"question {i}", ["yes", "ACDEFGHIKLMNPQRSTVWY" * 4][i % 2]) for i in range(60)]
    texts, _ = table(tmp_path, records)
    found = common_texts(texts, numbers(records), Listed(records))  # type: ignore[arg-type]
    assert [text.text for text in found] == ["yes"]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"gl": 0.7, "cl": 0.2, "eval": 0.1}, (70, 20, 10)),
        ({"gl": "rest", "eval": "5"}, (70, 25, 5)),
        ({"gl": 0, "cl": "0.25", "eval": "10"}, (0, 25, 10)),
        ({"gl": 1.0, "cl": 0, "eval": 0}, (100, 0, 0)),
        ({"cl": "rest"}, (0, 95, 5)),
        ({}, (70, 25, 5)),
        ({"gl": 0.333, "cl": 0.333, "eval": 0.334}, (34, 33, 33)),
    ],
)
def test_sizes(sizes: dict, expected: tuple[int, int, int]) -> None:
    labels = np.arange(110)
    usable = labels < 100
    side = assign(labels, usable, np.random.default_rng(0).permutation(110).astype(np.uint64), parse_sizes(sizes))
    assert tuple(int((side == which).sum()) for which in (GL, CL, EVAL)) == expected
    assert (side[100:] == UNUSED).all()


def test_components_stay_whole_and_nothing_is_lost() -> None:
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, 60, 500))
    side = assign(labels, np.ones(500, bool), rng.permutation(500).astype(np.uint64), parse_sizes({}))
    for label in np.unique(labels):
        assert len(set(side[labels == label].tolist())) == 1
    assert not (side == UNUSED).any()
    assert abs(int((side == EVAL).sum()) - 25) <= 10


def test_the_choice_depends_on_the_order_only_through_the_hash() -> None:
    order = np.random.default_rng(1).permutation(50).astype(np.uint64)
    labels = np.arange(50) // 2
    there = np.random.default_rng(2).permutation(50)
    a = assign(labels, np.ones(50, bool), order, parse_sizes({}))
    b = assign(labels[there], np.ones(50, bool), order[there], parse_sizes({}))
    assert np.array_equal(a[there], b)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"gl": "many"}, "--gl many: give a count"),
        ({"gl": "1.5"}, "--gl 1.5: a share lies between 0 and 1"),
        ({"eval": "-3"}, "--eval -3: must not be negative: give a count"),
        ({"gl": "0.9", "cl": "0.2"}, r"add up to more than 1 \(gl 0.9, cl 0.2, eval 0.05 \(default\)\): lower"),
        ({"eval": "1.0"}, r"\(gl rest \(default\), cl 0.25 \(default\), eval 1.0\)"),
        ({"gl": "rest", "cl": "rest"}, "only one of"),
        ({"test": "5"}, "--test: no such side"),
        ({"gl": 0, "cl": "0.0", "eval": "0"}, "--gl, --cl and --eval are all 0: give a side a size"),
    ],
)
def test_impossible_sizes(sizes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_sizes(sizes)


def test_sizes_that_the_records_cannot_meet() -> None:
    order = np.arange(10, dtype=np.uint64)
    with pytest.raises(UserError, match=r"ask for 12 .*records \(--gl 10, --cl 0, --eval 2\), the sources have 10"):
        assign(np.arange(10), np.ones(10, bool), order, parse_sizes({"gl": "10", "cl": 0, "eval": "2"}))
    with pytest.raises(UserError, match=r"--eval: no component .* fits into 2 records .* the largest has 10"):
        assign(np.zeros(10, int), np.ones(10, bool), order, parse_sizes({"cl": 0, "eval": "2"}))
    labels = np.array([0] * 7 + [7, 8, 9])
    with pytest.raises(
        UserError, match=r"--cl: all .* fit into 4 records \(3 in all\) went to eval .*: ask for less there"
    ):
        assign(labels, np.ones(10, bool), order, parse_sizes({"cl": "4", "eval": "3"}))
    assert (assign(labels, np.ones(10, bool), order, parse_sizes({"cl": "4", "eval": "2"})) == CL).sum() == 1


def test_sizes_that_are_asked_for_without_a_question_answer_record() -> None:
    nobody, order = np.zeros(9, bool), np.arange(9, dtype=np.uint64)
    for sizes, asked in (
        ({"eval": "100", "cl": "50"}, "--cl 50 and --eval 100"),
        ({"eval": "0.05"}, "--eval 0.05"),
        ({"cl": "rest", "eval": 0}, "--cl rest"),
    ):
        with pytest.raises(UserError, match=f"^{asked}: no question-answer record is left .* as plain text"):
            assign(np.arange(9), nobody, order, parse_sizes(sizes))
    for sizes in ({}, {"gl": "0.9", "cl": 0}, {"gl": 1.0, "cl": 0, "eval": "0"}):
        assert (assign(np.arange(9), nobody, order, parse_sizes(sizes)) == UNUSED).all()


def test_crossings_find_each_kind_of_leak(tmp_path: Path) -> None:
    rng = random.Random(4)
    base = [sentence(rng) for _ in range(3)]
    near = [" ".join([*words[:-1], "other"]) for words in base]
    records = [
        qa("a", " ".join(base[0])),  # 0 eval
        qa("b", near[0]),  # 1 gl: near 0
        qa("c", "A"),  # 2 cl: holds 0's question
        Record("", text=near[0]),  # 3 text: near 0
        Record("", text="other text"),  # 4 text, clean
        qa("d", " ".join(base[1])),  # 5 cl
        Record("", text=near[1]),  # 6 text near cl: allowed
        qa("e", " ".join(base[2])),  # 7 external
        qa("f", near[2]),  # 8 cl: near 7
        qa("g", near[1]),  # 9 gl: near 5, which is cl
    ]
    side = np.array([EVAL, GL, CL, TEXT, TEXT, CL, TEXT, EXTERNAL, CL, GL], np.int8)
    texts, sketches = table(tmp_path, records)
    found = crossings(side, texts, sketches, similarity=0.7, common=NOTHING)
    assert found.losers.tolist() == [1, 2, 3, 8, 9]
    assert {name: count for name, count in found.equal.items() if count} == {"cl - eval": 1}
    assert {name: count for name, count in found.near.items() if count} == {
        "gl - cl": 1,
        "gl - eval": 1,
        "gl texts - eval": 1,
        "cl - external evaluation": 1,
    }
    side[found.losers] = UNUSED
    assert not len(crossings(side, texts, sketches, similarity=0.7, common=NOTHING).losers)


def test_containment() -> None:
    target = "The vessel that carries blood away from the heart."
    containment = Containment([[target, "too short", "The vessel that carries blood away from the lungs"], [target]])
    held = containment.of(
        [
            "Lesson 3. The vessel that carries blood, away from the HEART is the aorta.",
            "The vessel that carries blood away from the liver",
            "the vessel that carries blood away from the",
            "heart. The vessel that carries blood away from the",
            "too short",
            "",
            "x the vessel that carries blood away from the lungs",
        ]
    )
    assert held.tolist() == [True, False, True, False, False, False, True]
    assert Containment([]).of([target]).tolist() == [False]


def test_a_part_of_an_evaluation_text_is_contained() -> None:
    answer = (
        "It relieves pain and fever. It acts by blocking the making of prostaglandins, early on. Take it with food."
    )
    containment = Containment([["short words of no account", answer]])
    found = containment.of(
        [
            "It acts by blocking the making of prostaglandins, early on.",
            "acts by blocking the making of prostaglandins, late",
            "blocking the making of prostaglandins, early on",  # seven words
            "It acts by blocking the making of prostaglandins, early on. So they say.",
            "Take it with food. It relieves pain and fever.",
        ]
    )
    assert found.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("アルツハイマー病", "祖母はアルツハイマー病と診断されました。"),
        ("โรคเบาหวาน", "ผู้ป่วยโรคเบาหวานควรออกกำลังกาย"),
        ("Alzheimer's disease", "My grandmother was told that it is Alzheimer's disease."),
    ],
)
def test_a_name_is_no_text_of_eight_words(name: str, page: str) -> None:
    assert Containment([[name]]).of([page]).tolist() == [False]


def test_a_phrase_in_a_script_of_letters_without_spaces_is_no_text_of_eight_words() -> None:
    phrase = "โรคเบาหวานชนิดที่สอง"  # twenty characters, some four words
    assert Containment([[phrase]]).of([f"ผู้ป่วย{phrase}ควรออกกำลังกาย"]).tolist() == [False]
    sentence = "โรคเบาหวานชนิดที่สองเกิดจากการดื้อต่ออินซูลิน"
    assert Containment([[sentence]]).of([f"บทที่หนึ่ง {sentence} จบ"]).tolist() == [True]


def test_a_template_in_a_script_without_spaces_links_no_more_than_elsewhere(tmp_path: Path) -> None:
    rng = random.Random(0)
    names = ["".join(chr(0x4E00 + rng.randrange(4000)) for _ in range(4)) for _ in range(20)]
    records = [qa(f"请问{name}的早期症状和治疗方法有哪些？", f"a {name}") for name in names]
    records += [
        qa(f"请问{name}病的早期症状和治疗方法有哪些？", f"b {name}") for name in names[:1]
    ]  # 4 characters of 19
    long = "感染幽门螺杆菌之后应该在多长时间内开始服用哪几种药物才能避免胃溃疡再次复发"
    records += [qa(long, "c"), qa(long.replace("之", ""), "d")]
    assert groups(tmp_path, records) == [*range(22), 21]


def test_a_definition_in_a_script_without_spaces_is_one() -> None:
    definition = "糖尿病是一种以高血糖为特征的代谢性疾病,由胰岛素分泌缺陷引起。"
    assert Containment([[definition]]).of([f"第一课。{definition}请记住。"]).tolist() == [True]
