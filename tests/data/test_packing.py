import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch

from salad_lightning.batch import DocumentInfo
from salad_lightning.data.packing import collate, pack
from salad_lightning.data.segments import Document, SpeechSpan


def _random_document(rng, number, longest=40):
    """A document of random tokens and spans, built with no help from the package's builders."""
    length = rng.randint(2, longest)
    ids = np.array([rng.randint(1, 999) for _ in range(length)], dtype=np.int64)
    predicted = np.array([rng.random() < 0.7 for _ in range(length)])
    spans, clips, position = [], [], 0
    while position < length:
        stop = min(length, position + rng.randint(1, 6))
        if rng.random() < 0.4:
            if not clips or rng.random() < 0.5:
                clips.append(np.full(rng.randint(1, 50), number + len(clips) / 10, dtype=np.float32))
            spans.append(SpeechSpan(position, stop, len(clips) - 1, rng.randint(0, 5), rng.randint(1, 9),
                                    rng.randint(1, 4), rng.randint(1, 8), rng.random()))  # fmt: skip
            predicted[position:stop] = False
        position = stop
    predicted[0] = False
    return Document(ids, predicted, DocumentInfo(f"d{number}", "s"), spans, clips)


def _elements(document):
    """What the student's row holds: ("text", token index) and ("speech", span, position of the span)."""
    elements, position = [], 0
    for span in document.spans:
        elements += [("text", index) for index in range(position, span.start)]
        elements += [("speech", span, index) for index in range(span.num_positions)]
        position = span.stop
    return elements + [("text", index) for index in range(position, len(document.token_ids))]


def _slow_batch(rows, width):
    """The student's side of a batch, element by element."""
    ids, positions, owners, predict_at, labels, label_owners, spans = [], [], [], [], [], [], []
    number = -1
    for row_number, row in enumerate(rows):
        flat = []
        for document in row:
            number += 1
            for at, element in enumerate(_elements(document)):
                here = row_number * width + len(flat)
                token = int(document.token_ids[element[1]]) if element[0] == "text" else 0
                flat.append((token, at, number))
                if element[0] == "speech" and element[2] == 0:
                    spans.append((here, element[1]))
                if element[0] == "text" and document.predicted[element[1]]:
                    predict_at.append(here - 1)
                    labels.append(token)
                    label_owners.append(number)
        flat += [(0, 0, -1)] * (width - len(flat))
        ids.append([x[0] for x in flat])
        positions.append([x[1] for x in flat])
        owners.append([x[2] for x in flat])
    return ids, positions, owners, predict_at, labels, label_owners, spans


@pytest.mark.parametrize("seed", range(8))
def test_batches_equal_a_slow_obvious_implementation(seed):
    rng = random.Random(seed)
    documents = [_random_document(rng, number) for number in range(60)]
    context = max(90, *(document.num_positions for document in documents))
    seen = []
    for packed in pack(documents, context, 3, lookahead=rng.choice([1, 2, 8, 32])):
        seen += [document.info.key for row in packed.rows for document in row]
        batch = collate(packed.rows, context=context, rows_per_batch=3)
        ids, positions, owners, predict_at, labels, label_owners, spans = _slow_batch(packed.rows, context)
        padding = 3 - len(ids)
        assert batch.input_ids_BS.tolist() == ids + [[0] * context] * padding
        assert batch.position_ids_BS.tolist() == positions + [[0] * context] * padding
        assert batch.document_ids_BS.tolist() == owners + [[-1] * context] * padding
        assert batch.predict_at_M.tolist() == predict_at
        assert batch.labels_M.tolist() == labels
        assert batch.predict_document_M.tolist() == label_owners
        assert batch.span_at_K.tolist() == [at for at, _ in spans]
        for name in ("first_frame", "num_frames", "num_words", "num_positions"):
            assert getattr(batch, f"span_{name}_K").tolist() == [getattr(span, name) for _, span in spans]
        flat = [document for row in packed.rows for document in row]
        clips = [document.clips[span.clip] for document in flat for span in document.spans]
        for clip, number in zip(clips, batch.span_clip_K.tolist(), strict=True):
            length = int(batch.clip_lengths_N[number])
            np.testing.assert_array_equal(batch.clips_NL[number, :length].numpy(), clip)
            assert (batch.clips_NL[number, length:] == 0).all()
        assert batch.num_positions == sum(owner >= 0 for row in owners for owner in row)
        assert batch.audio_seconds == pytest.approx(sum(span.seconds for _, span in spans))
        assert [info.key for info in batch.documents] == [document.info.key for document in flat]
    assert sorted(seen) == sorted(document.info.key for document in documents)


def test_clips_of_16_bits_are_those_of_floats():
    """Alone they stay as they are, beside floats they become floats; an encoder gets the same of both."""
    rng = random.Random(0)
    documents = [_random_document(rng, number) for number in range(12)]
    documents = [document for document in documents if document.clips]
    ints = np.random.default_rng(0)
    whole = [
        dataclasses.replace(
            document, clips=[ints.integers(-32768, 32768, len(c), dtype=np.int16) for c in document.clips]
        )
        for document in documents
    ]
    floats = [dataclasses.replace(d, clips=[c.astype(np.float32) / 32768 for c in d.clips]) for d in whole]
    size = {"context": max(document.num_positions for document in documents), "rows_per_batch": len(documents)}
    expected = collate([[document] for document in floats], **size)
    for mixed in (whole, [*whole[:1], *floats[1:]]):
        batch = collate([[document] for document in mixed], **size)
        assert batch.clips_NL.dtype == (torch.int16 if mixed is whole else torch.float32)
        assert torch.equal(batch.audio_NL, expected.clips_NL)


@pytest.mark.parametrize("seed", range(8))
def test_student_and_teacher_sit_right_before_the_same_token(seed):
    rng = random.Random(100 + seed)
    documents = [_random_document(rng, number) for number in range(40)]
    context = max(document.num_positions for document in documents) + 20
    predicted = 0
    for packed in pack(documents, context, 4):
        batch = collate(packed.rows, context=context, rows_per_batch=4)
        student_ids, teacher_ids = batch.input_ids_BS.flatten(), batch.teacher_input_ids_RU.flatten()
        assert torch.equal(student_ids[batch.predict_at_M + 1], batch.labels_M)
        assert torch.equal(teacher_ids[batch.teacher_predict_at_M + 1], batch.labels_M)
        for owners, at in (
            (batch.document_ids_BS, batch.predict_at_M),
            (batch.teacher_document_ids_RU, batch.teacher_predict_at_M),
        ):  # the predicting position and its token are of one document
            assert torch.equal(owners.flatten()[at], batch.predict_document_M)
            assert torch.equal(owners.flatten()[at + 1], batch.predict_document_M)
        spoken = torch.zeros_like(student_ids, dtype=torch.bool)
        for at, count in zip(batch.span_at_K.tolist(), batch.span_num_positions_K.tolist(), strict=True):
            spoken[at : at + count] = True
        assert not spoken[batch.predict_at_M + 1].any()  # no loss on speech
        # Teacher rows hold every transcript whole, with positions from 0.
        flat = [document for row in packed.rows for document in row]
        transcript = batch.teacher_input_ids_RU.flatten().tolist()
        spelled = [
            transcript[at : at + count]
            for at, count in zip(batch.span_token_at_K.tolist(), batch.span_num_tokens_K.tolist(), strict=True)
        ]
        spans = [(document, span) for document in flat for span in document.spans]
        assert spelled == [document.token_ids[span.start : span.stop].tolist() for document, span in spans]
        for number, document in enumerate(flat):
            mine = batch.teacher_document_ids_RU == number
            assert batch.teacher_input_ids_RU[mine].tolist() == document.token_ids.tolist()
            assert batch.teacher_position_ids_RU[mine].tolist() == list(range(len(document.token_ids)))
        assert batch.teacher_input_ids_RU.shape[1] <= context
        predicted += batch.num_predicted
    assert predicted == sum(int(document.predicted.sum()) for document in documents)


def test_rows_are_well_filled_and_the_oldest_goes_first():
    rng = random.Random(0)
    documents = [_random_document(rng, number, longest=300) for number in range(300)]
    batches = list(pack(documents, 1024, 4))
    filled = [sum(document.num_positions for document in row) for packed in batches[:-1] for row in packed.rows]
    assert np.mean(filled) / 1024 > 0.97
    placed = [int(document.info.key[1:]) for packed in batches for row in packed.rows for document in row]
    waits = [place - number for place, number in enumerate(placed)]
    assert max(abs(wait) for wait in waits) <= 32 * 6  # order is kept roughly; nothing starves


def test_pack_reads_ahead_no_further_than_asked():
    rng = random.Random(0)
    drawn = itertools.count()
    stream = (_random_document(rng, next(drawn)) for _ in itertools.count())
    packed = next(pack(stream, 200, 2, lookahead=5))
    placed = sum(len(row) for row in packed.rows)
    assert next(drawn) - placed == len(packed.pending) == 5


def test_speech_free_and_empty_batches_have_valid_shapes():
    document = Document(np.arange(5), np.array([False, True, True, True, True]), DocumentInfo("k", "s"))
    plain = collate([[document]], context=16, rows_per_batch=2)
    assert plain.clips_NL.shape == (0, 0)
    assert plain.span_at_K.shape == (0,)
    assert plain.num_predicted == 4
    empty = collate([], context=16, rows_per_batch=2, trim=True)
    assert empty.input_ids_BS.shape == (2, 1)
    assert empty.teacher_input_ids_RU.shape == (1, 1)
    assert empty.num_predicted == 0
    assert empty.labels_M.dtype == torch.int64
    assert empty.padding_share == 1.0
    assert collate([[document]], context=16, rows_per_batch=2, trim=True).input_ids_BS.shape == (2, 5)


def test_shared_clips_are_stored_once():
    clip = np.ones(10, np.float32)
    span = SpeechSpan(0, 2, 0, 0, 3, 2, 3, 0.1)
    predicted = np.array([False, False, True])
    documents = [Document(np.arange(3), predicted, DocumentInfo("k", "s"), [span], [clip]) for _ in range(4)]
    batch = collate([documents], context=20, rows_per_batch=1)
    assert batch.clips_NL.shape == (1, 10)
    assert batch.span_clip_K.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("types", "expected"), [(["f2", "f2"], torch.float16), (["f2", "f4"], torch.float32), (["i8", "i8"], torch.int64)]
)
def test_pre_encoded_clips_keep_their_type_or_take_the_wider(types, expected):
    span, predicted = SpeechSpan(0, 2, 0, 0, 3, 2, 3, 0.1), np.array([False, False, True])
    clips = [np.full((3, 2), 2049, dtype=np.dtype(kind)) * (1 + number) for number, kind in enumerate(types)]
    if types[1] == "f4":
        clips[1] += np.float32(0.3)
    documents = [Document(np.arange(3), predicted, DocumentInfo("k", "s"), [span], [c], encoded=True) for c in clips]
    batch = collate([documents], context=20, rows_per_batch=1)
    assert batch.stored_NT.dtype == expected
    for row, clip in zip(batch.stored_NT, clips, strict=True):
        assert row.tolist() == clip.tolist()


def test_contract_violations_raise():
    long = Document(np.arange(30), np.ones(30, bool), DocumentInfo("k", "s"))
    with pytest.raises(ValueError, match="does not fit"):
        list(pack([long], 20, 1))
    with pytest.raises(ValueError, match="do not fit"):
        collate([[long]], context=20, rows_per_batch=1)
    with pytest.raises(ValueError, match="first of a document"):
        collate([[long]], context=40, rows_per_batch=1)
    with pytest.raises(ValueError, match="at least 1"):
        list(pack([long], 40, 1, lookahead=0))
