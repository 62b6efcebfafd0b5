"""Counts machine instructions in Triton's disassembly."""

import re


def count_sass(text: str) -> tuple[int, int, int]:
    r"""Counts instructions, waits for wgmma and exponentials among them, in Triton's disassembly; NOP does not count.

    >>> count_sass("--:-:-:Y:1\t@!P0 BRA 0x10;\n01:-:0:-:4\tWARPGROUP.DEPBAR.LE gsb0, 0x0;\n--:-:-:Y:0\tNOP;")
    (2, 1, 0)
    """
    names = re.findall(r"^[\w:-]+\t(?:@\S+ )?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    kept = [name for name in names if name != "NOP"]
    waits, exponentials = (sum(name.startswith(of) for name in kept) for of in ("WARPGROUP.DEPBAR", "MUFU.EX2"))
    return len(kept), waits, exponentials


def longest_loop(text: str) -> int:
    """Counts the machine instructions of the longest loop in Triton's disassembly: from a label to the jump back to it.

    >>> longest_loop("LBB0:\\n--:-:-:Y:1\\tMUFU.EX2 R1, R2;\\n--:-:-:Y:1\\t@P0 BRA LBB0;")
    2
    """
    lines = text.splitlines()
    labels = {line[:-1]: place for place, line in enumerate(lines) if re.fullmatch(r"\w+:", line)}
    loops = [0]
    for place, line in enumerate(lines):
        jump = re.search(r"\bBRA (\w+);", line)
        if jump and labels.get(jump[1], place) < place:
            loops.append(count_sass("\n".join(lines[labels[jump[1]] : place + 1]))[0])
    return max(loops) if max(loops) > 1 else 0  # each program ends in a jump to itself
