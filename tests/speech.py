"""Speech from text, by the eSpeak NG library that the package espeakng-loader carries. Tests only."""

from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any

import numpy as np
from scipy.signal import resample_poly

SYNCHRONOUS, UTF8, DO_NOT_EXIT, RATE = 2, 1, 1 << 15, 1
"""Of eSpeak NG's ``speak_lib.h``: an output mode, a kind of text, an option, a parameter (words a minute)."""
Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@functools.cache
def _library() -> tuple[Any, int]:
    """The library, ready to speak English, and its sampling rate. It can be set up once in a process."""
    package: Any = importlib.import_module("espeakng_loader")
    library = ctypes.CDLL(package.get_library_path())
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, package.get_data_path().encode(), DO_NOT_EXIT)
    if rate <= 0:
        raise RuntimeError("eSpeak NG cannot be set up")
    library.espeak_SetSynthCallback.argtypes = [Callback]
    library.espeak_Synth.argtypes = [
        *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int),
        *(ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
    ]
    if library.espeak_SetVoiceByName(b"en-us") != 0:
        raise RuntimeError("eSpeak NG has no English voice")
    return library, rate


def speak(text: str, rate: int = 16000, words_a_minute: int = 140) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Samples in [−1, 1] of the text spoken, float32, ``rate`` in a second.

    The first text in a process is always spoken the same; later ones vary a little in length.

    Raises:
        ModuleNotFoundError: the package is not installed; RuntimeError: nothing is spoken.
    """
    library, own = _library()
    heard: list[np.ndarray[Any, Any]] = []

    def collect(samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = Callback(collect)  # held until the library is done with it
    library.espeak_SetParameter(RATE, words_a_minute, 0)
    library.espeak_SetSynthCallback(callback)
    content = text.encode()
    failed = library.espeak_Synth(content, len(content) + 1, 0, 0, 0, UTF8, None, None)
    library.espeak_SetSynthCallback(Callback())
    if failed or not heard:
        raise RuntimeError("eSpeak NG said nothing")
    samples = np.concatenate(heard).astype(np.float64) / 32768
    divisor = int(np.gcd(rate, own))
    return resample_poly(samples, rate // divisor, own // divisor).astype(np.float32)
