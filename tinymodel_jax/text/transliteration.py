"""Unicode text to ASCII, with the replacements of Unidecode 1.4.0 and without Unidecode, whose licence is the GPL.

For every code point, `to_ascii` returns the same as `unidecode.unidecode` of Unidecode 1.4.0, on every supported
Python; a lone surrogate gives the empty string, without a warning. Each character is replaced independently of
its neighbours.

The replacements are those of `text-unidecode`, with corrections in two steps. The results of the two libraries for
all 1,114,112 code points differ at 1,509. tests/test_transliteration.py repeats the comparison.

1. A rule. In nine ranges, a character that `text-unidecode` does not know is replaced by its compatibility form
   (Unicode's NFKC), and the form is transliterated: 𝐀, ⓐ and ℂ become A, a and C. Outside these ranges Unidecode drops
   such characters, so there the rule would be wrong at about 2,000 code points.
2. Exceptions, the 515 code points where Unidecode's result differs from that of `text-unidecode` and the rule.
"""

import functools
import unicodedata

from text_unidecode import unidecode as text_unidecode

_COMPATIBLE = (
    (0x1D2C, 0x1D6A),  # modifier letters and subscripts
    (0x2071, 0x209C),  # superscripts and subscripts
    (0x2102, 0x2149),  # letter-like signs
    (0x2460, 0x24EA),  # enclosed numbers and letters
    (0x3251, 0x325F),  # circled numbers
    (0x32B1, 0x32CF),  # circled numbers, units
    (0x1D400, 0x1D6A5),  # mathematical letters
    (0x1D7CE, 0x1D7FF),  # mathematical digits
    (0x1F100, 0x1F129),  # numbers and letters with comma or parentheses
)
"""First and last code points of the ranges of the rule."""

_EXCEPTIONS = {
    # Latin and Cyrillic
    0x00BC: "␣1/4 ␣1/2 ␣3/4",
    0x014A: "NG ng",
    0x0404: "Ie",
    0x042A: "'",
    0x044A: "'",
    # Armenian and Hebrew
    0x0589: ":",
    0x05B0: "∅",
    0x05BA: "o",
    0x05BC: "∅",
    0x05BE: "-",
    0x05C3: ".",
    0x05C6: "n o",
    0x05D0: "A",
    0x05D7: "H T",
    0x05DA: "KH KH",
    0x05E5: "TS TS k",
    0x05E9: "SH",
    0x05EF: "YYY",
    0x05F1: "OY EY",
    # phonetic letters
    0x1D00: "A AE ae B C D D E e i J K L M N O",
    0x1D11: "O",
    0x1D13: "O Oe Ou",
    0x1D18: "P R R T U u u m V W Z",
    0x1D2F: "B",
    0x1D32: "E",
    0x1D3B: "N",
    0x1D3D: "Ou",
    0x1D46: "ae",
    0x1D4A: "∅",
    0x1D4E: "i",
    0x1D51: "∅",
    0x1D53: "∅",
    0x1D59: "u m",
    0x1D60: "f ∅",
    0x1D69: "f ∅",
    0x1D6C: "b d f m n p r r s t z g",
    0x1D7D: "p",
    0x1D80: "b d f g k l m n p r s",
    0x1D8C: "v x z",
    # Latin
    0x1E9B: "S ∅ ∅ SS ∅",
    # punctuation and currencies
    0x2047: "??",
    0x204A: "&",
    0x204E: "*",
    0x2052: "% ~",
    0x2057: "''''",
    0x205F: "␣",
    0x2094: "∅",
    0x20B0: "Pf P G A UAH C| L Sm T Rs L M m R l BTC",
    # letter-like signs and fractions
    0x2100: "␣a/c␣ ␣a/s␣",
    0x2105: "␣c/o␣ ␣c/u␣ ∅",
    0x210F: "∅",
    0x2116: "No.␣ (p)",
    0x211F: "R/ (sm)",
    0x2122: "(tm) V/",
    0x2126: "ohm",
    0x212E: "e",
    0x2132: "F",
    0x2136: "∅ ∅ ∅",
    0x213C: "∅ ∅ ∅ ∅",
    0x214D: "A/S F",
    0x2150: "␣1/7␣ ␣1/9␣ ␣1/10␣",
    0x2189: "␣0/3␣",
    # mathematical and technical signs
    0x2212: "-",
    0x2215: "/ \\ *",
    0x2223: "|",
    0x2236: ":",
    0x223C: "~",
    0x2264: "<= >= <= >=",
    0x2303: "^",
    0x2329: "< >␣",
    # circled numbers
    0x24EB: "11 12 13 14 15 16 17 18 19 20",
    0x24F5: "1 2 3 4 5 6 7 8 9 10 0",
    # chess, cards, music, ornaments
    0x2654: "white␣king white␣queen white␣rook white␣bishop white␣knight white␣pawn",
    0x265A: "black␣king black␣queen black␣rook black␣bishop black␣knight black␣pawn",
    0x2660: "spades hearts diamonds clubs spades hearts diamonds clubs",
    0x266F: "#",
    0x2731: "*",
    0x2758: "|",
    0x275C: '\' " " , ,,',
    0x2762: "!",
    # brackets
    0x27E6: "[",
    0x27E8: "< >␣",
    0x2983: "{ }␣",
    0x2A74: "::= == ===",
    # Latin
    0x2C60: "L l L P R a t H h K k Z z",
    0x2C6E: "M A",
    # editors' punctuation
    0x2E00: "r r.",
    0x2E06: "T T.",
    0x2E09: "s",
    0x2E0B: "[] \\ /",
    0x2E0F: "__",
    0x2E12: "> %",
    0x2E16: "> =",
    0x2E19: "/ - ~ \\ / ~ ~ |- -|",
    0x2E26: "<= => (( ))",
    0x2E2C: "::",
    0x2E2E: "? ' o . , . , ;",
    0x2E3A: "---- ------",
    0x2E3C: "x |",
    0x2E40: '= , " `--',
    # Japanese
    0x3057: "shi",
    0x3061: "chi",
    0x3063: "tsu tsu",
    0x30A0: "=",
    0x30B7: "shi",
    0x30C1: "chi",
    0x30C3: "tsu tsu",
    0x30FB: "* -",
    # units
    0x3371: "hPa",
    0x3377: "dm dm^2 dm^3 IU",
    0x3382: "uA",
    0x338C: "uF ug",
    0x3395: "ul",
    0x339B: "um",
    0x33A3: "mm^3",
    0x33B2: "us",
    0x33B6: "uV",
    0x33BC: "uW",
    0x33DE: "V/m A/m",
    0x33FF: "gal",
    # Hebrew presentation forms
    0xFB1D: "i",
    0xFB1F: "AY",
    0xFB21: "A",
    0xFB24: "KH",
    0xFB27: "r",
    0xFB2A: "SH S SH S",
    0xFB30: "A",
    0xFB3A: "KH KH",
    0xFB3E: "m",
    0xFB41: "s",
    0xFB46: "TS k",
    0xFB49: "SH",
    0xFB4B: "o v KH f EL",
    # bold Greek
    0x1D6A8: "Alpha Beta Gamma Delta Epsilon Zeta Eta Theta Iota Kappa Lamda Mu",
    0x1D6B4: "Nu Xi Omicron Pi Rho Theta Sigma Tau Upsilon Phi Chi Psi Omega nabla",
    0x1D6C2: "alpha beta gamma delta epsilon zeta eta theta iota kappa lamda mu nu",
    0x1D6CF: "xi omicron pi rho sigma sigma tau upsilon phi chi psi omega",
    # enclosed letters and words
    0x1F12A: "<S>",
    0x1F12B: "(C) (R)",
    0x1F130: "[A] [B] [C] [D] [E] [F] [G] [H] [I] [J] [K] [L] [M] [N] [O] [P] [Q] [R] [S] [T] [U] [V] [W] [X] [Y] [Z]",
    0x1F150: "(A) (B) (C) (D) (E) (F) (G) (H) (I) (J) (K) (L) (M) (N) (O) (P) (Q) (R) (S) (T) (U) (V) (W) (X) (Y) (Z)",
    0x1F16A: "(mc) (md) (mr)",
    0x1F170: "[A] [B] [C] [D] [E] [F] [G] [H] [I] [J] [K] [L] [M] [N] [O] [P] [Q] [R] [S] [T] [U] [V] [W] [X] [Y] [Z]",
    0x1F190: "DJ [CL] [COOL] [FREE] [ID] [NEW] [NG] [OK] [SOS] [UP!] [VS] [3D] [2nd-Scr]",
    0x1F19D: "[2K] [4K] [8K] [5.1] [7.1] [22.2]",
    0x1F1A3: "[60P] [120P] [d] [HC] [HDR] [Hi-res] [Lossless] [SHV] [UHD] [VOD] (m)",
    # ornaments
    0x1F670: 'et et et et & & " " ,, !? !? !?',
}
"""Replacements of consecutive code points, starting at the given one. `␣` is a space and `∅` is nothing."""

_MAX_CACHED_CHARACTERS = 1 << 16  # 65,536, about 10 MB


def to_ascii(text: str) -> str:
    """Replace every character by its ASCII transliteration, or by nothing when it has none."""
    return "".join(map(_replacement, text))


@functools.lru_cache(_MAX_CACHED_CHARACTERS)
def _replacement(character: str) -> str:
    corrected = _corrections().get(character)
    return _uncorrected(character) if corrected is None else corrected


def _uncorrected(character: str) -> str:
    """Return the result of `text-unidecode`, without its sign for an unknown character, which is `[?]` or `[?] `."""
    replacement = text_unidecode(character)
    return "" if replacement.startswith("[?]") else replacement


@functools.cache
def _corrections() -> dict[str, str]:
    in_ranges = (chr(code) for first, last in _COMPATIBLE for code in range(first, last + 1))
    corrections = {
        character: "".join(map(_uncorrected, unicodedata.normalize("NFKC", character)))
        for character in in_ranges
        if not _uncorrected(character)
    }
    signs = str.maketrans({"␣": " ", "∅": ""})
    for first, replacements in _EXCEPTIONS.items():
        for code, replacement in enumerate(replacements.split(" "), first):
            corrections[chr(code)] = replacement.translate(signs)
    return corrections
