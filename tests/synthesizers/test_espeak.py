import itertools
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest

from salad_lightning.errors import UserError
from salad_lightning.synthesizers.espeak import EspeakSynthesizer
from salad_lightning.testing.contracts.synthesizer import SynthesizerContract

_TEXT = "The river of tamiko is in the soruna, and so on."


class TestEspeak(SynthesizerContract):
    def make_synthesizer(self):
        return EspeakSynthesizer()


class TestEspeakOtherVoice(SynthesizerContract):
    def make_synthesizer(self):
        return EspeakSynthesizer("en-gb-x-rp+f2", rate_wpm=220, pitch=70)


def test_fused_words_are_one_unit():
    words = [unit.word for unit in EspeakSynthesizer().speak("It is in the house of the king.").words]
    assert "in the" in words
    assert "house" in words


def test_voice_does_not_depend_on_what_was_said_before():
    voices = ["en-us", "gmw/en", "en-gb", "en-gb-x-rp+m3", "en-us+f2", "en-us+f5", "en-gb-scotland+m1", "en-us+klatt"]
    first = {voice: EspeakSynthesizer(voice).speak(_TEXT).audio for voice in voices}
    random.Random(0).shuffle(voices)
    for voice in voices:
        np.testing.assert_array_equal(EspeakSynthesizer(voice).speak(_TEXT).audio, first[voice], err_msg=voice)
    sounds = [first[voice] for voice in voices if voice not in ("en-gb", "gmw/en")]
    assert len({sound.tobytes() for sound in sounds}) == len(sounds), "voices sound alike"


def test_rate_and_pitch():
    slow, fast = (EspeakSynthesizer(rate_wpm=rate).speak(_TEXT).audio for rate in (120, 240))
    assert 1.6 < len(slow) / len(fast) < 2.4
    low, high = (_pitch_hz(EspeakSynthesizer(pitch=pitch).speak("Ma ma ma ma.").audio) for pitch in (20, 80))
    assert high > 1.2 * low


def test_word_times_agree_with_energy():
    """A word in a sentence of pauses sits where the sound is."""
    audio, words = EspeakSynthesizer().speak("One. Two. Three.")
    loud = np.abs(audio) > 0.02
    inside = np.zeros(len(audio), bool)
    for unit in words:
        inside[round(unit.start_s * 22050) : round(unit.end_s * 22050)] = True
    assert loud[~inside].mean() < 0.01
    assert loud[inside].mean() > 0.2


def test_phonemes_cover_the_audio():
    speech, phonemes = EspeakSynthesizer().speak_with_phonemes("See a bee.")
    assert [phoneme.name for phoneme in phonemes if phoneme.name][:2] == ["s", "i:"]
    for before, after in itertools.pairwise(phonemes):
        assert before.end_s == after.start_s
    assert phonemes[-1].end_s == pytest.approx(len(speech.audio) / 22050)


def test_threads_and_processes_say_the_same():
    alone = EspeakSynthesizer().speak(_TEXT).audio
    with ThreadPoolExecutor(4) as pool:
        for audio in pool.map(_say, [_TEXT] * 8):
            np.testing.assert_array_equal(audio, alone)
    with ProcessPoolExecutor(2) as pool:
        np.testing.assert_array_equal(next(pool.map(_say, [_TEXT])), alone)


@pytest.mark.parametrize(("voice", "named"), [("en-xx", "en-us"), ("en-us+nobody", "m3")])
def test_unknown_voice_lists_the_known(voice, named):
    with pytest.raises(UserError, match=named):
        EspeakSynthesizer(voice)


@pytest.mark.parametrize("setting", [{"rate_wpm": 10}, {"rate_wpm": 900}, {"pitch": 100}, {"pitch": -1}])
def test_settings_out_of_range(setting):
    with pytest.raises(ValueError, match="must be"):
        EspeakSynthesizer(**setting)


def test_punctuation_alone_is_nothing_to_say():
    with pytest.raises(UserError, match="nothing to say"):
        EspeakSynthesizer().speak("...")


def _say(text):
    return EspeakSynthesizer().speak(text).audio


def _pitch_hz(audio):
    """From the strongest period of 1/300 to 1/75 s in the autocorrelation."""
    power = np.abs(np.fft.rfft(audio, 2 * len(audio))) ** 2
    correlation = np.fft.irfft(power)
    lags = np.arange(22050 // 300, 22050 // 75)
    return 22050 / lags[correlation[lags].argmax()]
