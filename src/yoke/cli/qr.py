"""An invite as a QR code in the terminal: two modules to a character, so that it is as high as it is wide."""

from rich.text import Text

_QUIET = 4
"""Light modules around the code, as ISO/IEC 18004 asks for."""

_HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}


def qr_lines(text: str) -> list[str]:
    """The code of ``text``, light modules drawn and dark ones left out: right for a dark terminal.

    In capital letters, which QR codes hold in fewer modules; an invite may be read so. An invite with one address makes 41 columns and 21 lines.
    """
    import segno  # here, because it takes 37 ms, and few commands draw

    code = segno.make_qr(text.upper(), error="l", boost_error=False)
    rows = [[not module for module in row] for row in code.matrix_iter(border=_QUIET)]
    if len(rows) % 2:
        rows.append([False] * len(rows[0]))  # below the code is the terminal's own dark ground
    return ["".join(_HALVES[pair] for pair in zip(upper, lower, strict=True)) for upper, lower in zip(rows[::2], rows[1::2], strict=True)]


def qr_text(text: str) -> Text:
    """The same with its colours set, so that it is right on a light terminal too."""
    return Text("\n".join(qr_lines(text)), style="white on black", no_wrap=True)
