import os
import unicodedata

import pytest

from selcon_plugin.io.names import escape, printable, unescape

NAMES = [
    "plain.jpg",
    "Zo\u00eb \u4eba \U0001f469\u200d\U0001f4bb.jpg",  # letters and emoji are kept
    "\x1b]0;title\x07\x1b[2J.jpg",
    "two\nlines\r.jpg",
    "\x9b31m.jpg",
    "\u202egnp.exe",
    "\u2028\u2029\ufeff\u00ad",
    "M\udcfc.jpg",
    "back\\slash\\x1b\\n",
    "\\\\u202e",
    "\U000e0041",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printable_and_read_back_exactly(name):
    for text in (printable(name), escape(name)):
        kinds = {unicodedata.category(c) for c in text if c != "\u200d"}
        assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
        text.encode()
    assert unescape(escape(name)) == name


def test_letters_stay_and_controls_are_named():
    assert printable(NAMES[1]) == NAMES[1]
    assert printable("a\x1b[2J\u202e\udce9") == r"a\x1b[2J\u202e\udce9"
    assert printable(b"M\xfc") == printable(os.fsdecode(b"M\xfc")) == r"M\udcfc"
