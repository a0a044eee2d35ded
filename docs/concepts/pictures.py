"""Draws the pictures of the documentation, one SVG file each, into this folder.

    python docs/concepts/pictures.py

One style for all: 400 units wide, no letter below 13 units (11 pixels on a screen of 375), light and dark as the reader
has it, client blue, server orange, head green, and each of them named as well. `tests/test_pictures.py` holds this true
and compares the files with what this script draws. The numbers in where-to-cut.svg are those of `halfpass cuts`.
"""

import re
from html import escape
from pathlib import Path

import halfpass

WIDTH = 400  # units
SHOWN = 600  # pixels, where there is room
STYLE = """
.ground{fill:#fff}.ink{fill:#1f2933}.soft{fill:#52606d}
.client{fill:#dcecf7;stroke:#0072b2}.server{fill:#fbe6d8;stroke:#c24f00}.head{fill:#d9f2e8;stroke:#007a59}
.plain{fill:#eef0f3;stroke:#6b7785}.line{stroke:#52606d}.faint{stroke:#aab4bf}
.t-client{fill:#005a8c}.t-server{fill:#a84300}.t-head{fill:#00664a}
.b-client{fill:#0072b2}.b-server{fill:#d55e00}.b-line{fill:#52606d}
@media(prefers-color-scheme:dark){
.ground{fill:#15191e}.ink{fill:#e8ecf0}.soft{fill:#aab4bf}
.client{fill:#12344a;stroke:#56b4e9}.server{fill:#4a2a10;stroke:#f0a050}.head{fill:#0d3d30;stroke:#35c79b}
.plain{fill:#262d35;stroke:#8a95a1}.line{stroke:#aab4bf}.faint{stroke:#52606d}
.t-client{fill:#7cc6f2}.t-server{fill:#f5b070}.t-head{fill:#4fd8ad}
.b-client{fill:#56b4e9}.b-server{fill:#e08a3c}.b-line{fill:#aab4bf}}
text{font-family:Helvetica,Arial,system-ui,sans-serif}.mono{font-family:ui-monospace,Menlo,Consolas,monospace}
"""


class Picture:
    """Shapes in units, top left 0, 0. `title` and `desc` are for who hears the page."""

    def __init__(self, height: int, title: str, desc: str) -> None:
        self.height, self.title, self.desc, self.parts = height, title, desc, list[str]()

    def text(
        self, x: float, y: float, words: str, kind: str = "ink", size: int = 13, at: str = "middle", bold: bool = False
    ) -> None:
        """A line of text whose foot is at y."""
        weight = ' font-weight="700"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}" font-size="{size}" text-anchor="{at}"{weight}>'
            f"{escape(words)}</text>"
        )

    def lines(self, x: float, y: float, words: str, kind: str = "ink", at: str = "middle", bold: bool = False) -> None:
        """Lines of text, parted by |, the first at y."""
        for number, line in enumerate(words.split("|")):
            self.text(x, y + 16 * number, line, kind, at=at, bold=bold)

    def box(self, x: float, y: float, w: float, h: float, kind: str, words: str = "", below: str = "") -> None:
        """A box, its name in the middle, and what it does below that."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" class="{kind}" stroke-width="1.5"/>'
        )
        count = len(words.split("|")) + (len(below.split("|")) if below else 0)
        first = y + h / 2 + 4.5 - 8 * (count - 1)
        self.lines(x + w / 2, first, words, bold=bool(below))
        if below:
            self.lines(x + w / 2, first + 16 * len(words.split("|")), below)

    def bar(self, x: float, y: float, w: float, h: float, kind: str) -> None:
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" class="{kind}"/>')

    def arrow(self, *points: tuple[float, float], width: float = 2, dash: bool = False) -> None:
        """A line through the points with a head at the last."""
        way = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashed = ' stroke-dasharray="4 4"' if dash else ""
        self.parts.append(
            f'<polyline points="{way}" class="line" fill="none" stroke-width="{width:g}" '
            f'marker-end="url(#tip)"{dashed}/>'
        )

    def rule(self, x1: float, y1: float, x2: float, y2: float, dash: bool = False) -> None:
        dashed = ' stroke-dasharray="5 5"' if dash else ""
        self.parts.append(f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" class="faint" stroke-width="1.5"{dashed}/>')

    def svg(self) -> str:
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="9" markerHeight="9" '
            'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" class="b-line"/></marker></defs>'
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{SHOWN}" '
            f'height="{self.height * SHOWN / WIDTH:g}" role="img" aria-labelledby="title desc">\n'
            f'<title id="title">{escape(self.title)}</title>\n<desc id="desc">{escape(self.desc)}</desc>\n'
            f"<style>{STYLE}</style>{tip}\n"
            f'<rect width="{WIDTH}" height="{self.height}" class="ground"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def how_a_batch_travels() -> Picture:
    """algorithm/client.py and server.py: `decoupled_step` beside `conventional_forward` and `conventional_backward`."""
    p = Picture(
        400, "How a batch travels",
        "Decoupled: the client half learns from the local loss of an auxiliary head and sends detached activations and "
        "labels to the server half, which learns from the true loss. Nothing comes back. Conventional: the client half "
        "sends activations and labels, waits, and learns from the gradients that the server half sends back.",
    )  # fmt: skip
    for middle, name in ((100, "Decoupled"), (300, "Conventional")):
        p.text(middle, 28, name, size=19, bold=True)
        p.box(middle - 84, 44, 168, 50, "server", "server half", "learns: true loss")
        p.box(middle - 84, 312, 168, 30, "plain", "data stay here")
    p.rule(200, 12, 200, 390)
    p.rule(10, 160, 390, 160, dash=True)
    p.parts.append('<rect x="178" y="151" width="44" height="18" class="ground"/>')
    p.text(200, 165, "wire", "soft")
    p.arrow((38, 214), (38, 98), width=4)
    p.lines(50, 124, "activations,|labels", at="start")
    p.text(50, 184, "a.detach(), y", "soft mono", at="start")
    p.text(50, 204, "nothing back", "t-head", 15, "start", True)
    p.box(16, 216, 84, 46, "client", "client|half")
    p.box(114, 216, 70, 46, "head", "auxiliary|head")
    p.arrow((100, 239), (112, 239))
    p.arrow((149, 264), (149, 282), (72, 282), (72, 265))
    p.text(110, 299, "local loss", "t-head", bold=True)
    p.arrow((38, 311), (38, 265))
    p.arrow((234, 214), (234, 98), width=4)
    p.lines(246, 124, "activations,|labels", at="start")
    p.text(246, 204, "a, y", "soft mono", at="start")
    p.arrow((366, 97), (366, 213), width=4)
    p.text(357, 184, "gradients", at="end")
    p.text(357, 204, "a.grad", "soft mono", at="end")
    p.box(216, 216, 168, 46, "client", "client half")
    p.text(310, 292, "waits for gradients", "soft", bold=True)
    p.arrow((234, 311), (234, 265))
    p.lines(100, 364, "half the bytes,|no wait for gradients", "t-head", bold=True)
    p.lines(300, 364, "up and down,|a wait for every batch", "soft", bold=True)
    return p


def time_lines() -> Picture:
    """Drawn to one scale: forward 18, backward and head 34, server 46, a message 14 on its way."""
    forward, backward, server, wire = 18, 34, 46, 14
    p = Picture(
        398, "Who waits for whom",
        "Conventional: client and server take turns, so that one of them always waits. Decoupled: the client goes "
        "from batch to batch, and the server learns from each as it comes. In the time of three conventional "
        "batches the decoupled client does seven, and the server six.",
    )  # fmt: skip

    def batch(x: float, y: float, width: float, kind: str, words: object) -> None:
        p.box(x, y, width - 1, 30, kind, str(words))

    def gap(x: float, y: float) -> None:
        p.bar(x - 21, y - 10, 42, 14, "ground")
        p.text(x, y, "waits", "soft")

    def lanes(top: int, name: str) -> None:
        p.text(10, top, name, size=17, at="start", bold=True)
        p.text(10, top + 24, "server", "t-server", at="start", bold=True)
        p.text(10, top + 134, "client", "t-client", at="start", bold=True)
        for y in (top + 46, top + 102):
            p.rule(10, y, 390, y)

    lanes(26, "Conventional")
    start = 12.0
    for number in (1, 2, 3):
        batch(start, 113, forward, "client", number)
        there = start + forward + wire
        p.arrow((start + forward, 112), (there, 90))
        batch(there, 57, server, "server", number)
        back = there + server + wire
        p.arrow((there + server, 89), (back, 111))
        gap((start + forward + back) / 2, 133)
        if number < 3:
            gap(there + server + (forward + backward + 2 * wire) / 2, 77)
        batch(back, 113, backward, "client", number)
        start = back + backward
    lanes(200, "Decoupled")
    start, free = 12.0, 0.0
    for number in range(1, 8):
        width = forward + backward - 1  # the head is a small part of it
        if start + width < 392:
            batch(start, 287, width, "client", number)
            there = start + width + wire
            p.arrow((start + width, 286), (there, 264))
            free = max(free, there)
            if free + server < 396:
                batch(free, 231, server, "server", number)
            free += server
        start += width
    p.lines(200, 352, "Within an epoch the client stops only when|wire.window bytes are not acknowledged.")
    p.text(200, 386, "Drawn, not measured.", "soft")
    return p


def where_to_cut() -> Picture:
    """The rows of `halfpass cuts --model.name resnet20` behind whole blocks, for pictures of 32×32 and ten classes."""
    rows = halfpass.cut_table("resnet20", (3, 32, 32), 10, "linear")
    found = {}
    for row in rows:
        for name in (row.layer, *row.also):
            if re.fullmatch(r"stem|stage_\d\.\d|pool", name):
                found[name] = row
    top, step = 84, 25
    p = Picture(
        top + step * len(found) + 62, "Where to cut a ResNet-20",
        "; ".join(
            f"{name}: {row.activation_bytes_per_sample / 1024:g} KiB per sample, client has "
            f"{100 * row.client_flops / (row.client_flops + row.server_flops):.0f} % of the computing"
            for name, row in found.items()
        ),
    )  # fmt: skip
    p.text(200, 26, "Where to cut a ResNet-20", size=17, bold=True)
    p.text(12, 52, "cut after", "soft", at="start")
    p.lines(92, 52, "what crosses,|KiB per picture", "t-server", "start", True)
    p.lines(262, 52, "computing at|the client, %", "t-client", "start", True)
    for number, (name, row) in enumerate(found.items()):
        y = top + step * number
        kib = row.activation_bytes_per_sample / 1024
        share = row.client_flops / (row.client_flops + row.server_flops)
        p.text(12, y + 14, name, at="start")
        p.bar(92, y + 2, max(1, kib * 1.75), 15, "b-server")
        p.text(97 + kib * 1.75, y + 14, f"{kib:g}", at="start")
        p.bar(262, y + 2, max(1, share * 92), 15, "b-client")
        p.text(267 + share * 92, y + 14, f"{100 * share:.0f}", at="start")
    foot = top + step * len(found) + 20
    p.text(200, foot, "Later: fewer bytes, more work for the client.", bold=True)
    p.text(200, foot + 17, "Inside a block up to twice as much crosses:")
    p.text(200, foot + 33, "the shortcut goes along.")
    return p


def topologies() -> Picture:
    """README, Topologies and An edge in between; run/rounds.py, run/edge.py."""
    p = Picture(
        532, "Topologies",
        "Relay: one client half goes from client to client in turn. Splitfed: clients train in parallel, and the "
        "server averages their halves. Independent: every client keeps its own half. In all three there is one "
        "server half. Chain: client, edge and server, with one-way wires; the edge has a head of its own.",
    )  # fmt: skip
    p.rule(200, 14, 200, 496)
    p.rule(12, 252, 388, 252)

    def three(x: float, y: float, name: str, what: str) -> None:
        p.text(x, y, name, size=17, bold=True)
        p.box(x - 84, y + 16, 168, 30, "server", "server half")
        for number in range(3):
            left = x - 84 + 60 * number
            p.box(left, y + 84, 48, 44, "client", f"client|{number}")
            p.arrow((left + 24, y + 82), (left + 24, y + 49))
        p.lines(x, y + 191, what, "soft")

    three(100, 30, "relay", "one client half goes|from client to client")
    p.arrow((40, 160), (40, 176), (98, 176), (98, 161), dash=True)
    p.arrow((102, 160), (102, 176), (160, 176), (160, 161), dash=True)
    three(300, 30, "splitfed", "client halves are|averaged every round")
    for left in (216, 276, 336):
        p.arrow((left + 12, 159), (left + 12, 177), dash=True)
        p.arrow((left + 36, 179), (left + 36, 161), dash=True)
    p.box(216, 180, 168, 24, "plain", "average, by the server")
    three(100, 286, "independent", "every client|keeps its own half")
    p.text(300, 286, "chain", size=17, bold=True)
    p.box(216, 302, 168, 30, "server", "server half")
    p.box(216, 352, 92, 30, "plain", "edge half")
    p.box(324, 352, 60, 30, "head", "head")
    p.box(216, 402, 92, 30, "client", "client half")
    p.box(324, 402, 60, 30, "head", "head")
    for y in (352, 402):
        p.arrow((262, y - 1), (262, y - 17))
        p.arrow((309, y + 15), (321, y + 15))
    p.lines(300, 474, "the edge learns from a head|too; nothing comes back", "soft")
    p.text(200, 518, "Dashed: weights. Arrows up: activations, labels.", "soft")
    return p


def thin_uplink() -> Picture:
    """run/uplink.py: every, then the codec, then the budget, which counts encoded bytes; then the window."""
    p = Picture(
        506, "What a thin uplink does",
        "A batch at the client passes in this order: learning, wire.every, wire.codec, wire.budget, wire.window, the "
        "wire. At the server it is decoded, learned from, and with server.replay used again.",
    )  # fmt: skip
    p.text(200, 26, "From the client to the server", size=17, bold=True)
    stations = (
        ("client", "client half learns", "from every batch"),
        ("plain", "wire.every 4", "one batch of four goes up"),
        ("plain", "wire.codec int4+zstd", "4 bits a value, packed"),
        ("plain", "wire.budget BYTES", "at most so many in the whole run"),
        ("plain", "wire.window BYTES", "so far ahead of the server"),
    )
    for number, (kind, name, what) in enumerate(stations):
        y = 42 + 68 * number
        p.box(16, y, 236, 48, kind, name, what)
        p.arrow((134, y + 48), (134, y + 66), width=4)
    leaves = ((134, "the others|stay here"), (270, "what is ahead of|its share stays"), (338, "full: the|client waits"))
    for y, words in leaves:
        p.arrow((254, y), (272, y))
        p.lines(278, y - 3, words, "soft", "start")
    p.lines(278, 199, "what is decoded|is learned from", "soft", "start")
    p.rule(12, 396, 388, 396, dash=True)
    p.text(380, 390, "wire", "soft", at="end")
    p.arrow((134, 380), (134, 410), width=4)
    p.box(16, 412, 236, 48, "server", "server half learns", "server.replay 2: twice from each")
    p.text(278, 441, "nothing back", "t-head", at="start", bold=True)
    p.text(200, 490, "Every station may be left out. The order is fixed.", "soft")
    return p


def what_survives() -> Picture:
    """docs/operations.md, Started again; docs/protocol.md, Places and Connected again."""
    p = Picture(
        532, "What survives",
        "The client keeps a checkpoint and a spool of what it sent, the server a checkpoint, a ledger of what it "
        "learned from and an outbox. A killed client or server goes on by halfpass resume, a lost link by itself; "
        "what the other side lacks is sent again. Nothing is lost, and nothing is learned from twice.",
    )  # fmt: skip
    p.box(12, 40, 130, 116, "client")
    p.box(258, 40, 130, 116, "server")
    p.text(77, 26, "client", size=17, bold=True)
    p.text(323, 26, "server", size=17, bold=True)
    for x, words in ((22, "checkpoint|spool: what it|sent, until it is|in the server's|checkpoint"),
                     (268, "checkpoint|ledger: what it|learned from|outbox: what it|sent to clients")):  # fmt: skip
        p.lines(x, 66, words, at="start")
    p.arrow((144, 80), (255, 80), width=4)
    p.lines(200, 52, "batches,|numbered")
    p.arrow((256, 112), (146, 112))
    p.lines(200, 132, "“learned”,|“on my disk”", "soft")
    events = (
        ("client killed", "t-client", "halfpass resume, at the client",
         "It goes on from its checkpoint. The server|waits for it, ten minutes unless|wire.reconnect says otherwise."),
        ("server killed", "t-server", "halfpass resume, at the server",
         "A decoupled client trains on, to the end|of its epoch or round, and keeps the|batches."),
        ("link lost", "t-head", "nothing to do: it connects again",
         "Each says what it has, and gets the rest."),
    )  # fmt: skip
    y = 180
    for name, kind, remedy, words in events:
        p.rule(12, y, 388, y)
        p.lines(12, y + 24, name.replace(" ", "|"), at="start", bold=True)
        p.text(96, y + 24, remedy, kind, at="start", bold=True)
        p.lines(96, y + 42, words, at="start")
        y += 56 + 16 * words.count("|")
    p.rule(12, y, 388, y)
    p.box(
        12, y + 16, 376, 58, "head", "Nothing lost, nothing learned from twice.",
        "With wire.order round-robin the weights are|those of a run without a fault.",
    )  # fmt: skip
    p.height = y + 86
    return p


def who_sees_what() -> Picture:
    """docs/threat-model.md, decoupled training over TLS."""
    rows = (
        ("inputs, raw data", "●", "", ""),
        ("labels, all targets", "●", "", "●"),
        ("activations that go up", "●", "", "●"),
        ("head’s answers in tests", "●", "", "●"),
        ("server half", "", "", "●"),
        ("client half and head", "●", "", "◐"),
        ("gradients", "", "", ""),
        ("counts, losses, times", "●", "", "●"),
        ("hosts, message sizes", "●", "●", "●"),
    )
    p = Picture(
        524, "Who sees what, in decoupled training",
        "The client alone has the raw inputs. The server gets labels, the activations that go up and the head's "
        "answers in tests; it has the server half, and the client halves where they are averaged or relayed. No "
        "gradient crosses. Somebody on the wire sees, with TLS, hosts, sizes and times.",
    )  # fmt: skip
    p.text(200, 26, "Who sees what: decoupled", size=17, bold=True)
    for x, name, kind in ((216, "client", "t-client"), (286, "wire, TLS", "soft"), (356, "server", "t-server")):
        p.text(x, 54, name, kind, bold=True)
    for number, (name, *marks) in enumerate(rows):
        y = 84 + 30 * number
        p.rule(12, y - 20, 388, y - 20)
        p.text(12, y, name, at="start")
        for x, mark in zip((216, 286, 356), marks, strict=True):
            p.text(x, y + 1, mark or "–", "ink" if mark else "soft", size=17 if mark else 13)
    y = 84 + 30 * len(rows)
    p.rule(12, y - 20, 388, y - 20)
    p.lines(
        12, y + 2, "◐ where client halves are averaged or relayed;|    else as they started|"
        "model.may_cross: an input that goes up too|train.feedback_every: some gradients come down", "soft", "start",
    )  # fmt: skip
    p.box(
        12, y + 68, 376, 78, "server", "Activations are no secret.",
        "Whoever knows the client half can rebuild|pictures from them. A codec is no defence.|"
        "Labels go to the server as they are.",
    )  # fmt: skip
    return p


def rounds_and_streams() -> Picture:
    """docs/flower.md, Two ways to carry a run; docs/nvflare.md."""
    p = Picture(
        466, "Rounds and streams",
        "Rounds, on Flower and NVFlare: the engine carries a message for each round, and a reply with all its "
        "batches; the next round goes out before the server learns from the last. Streams, on Flower: the engine "
        "starts the processes, and batches go to halfpass's own port one by one.",
    )  # fmt: skip
    p.text(12, 26, "Rounds", size=17, at="start", bold=True)
    p.text(388, 26, "Flower, NVFlare", "soft", at="end")
    p.text(12, 48, "server", "t-server", at="start", bold=True)
    p.text(12, 180, "client", "t-client", at="start", bold=True)
    for y in (56, 134):
        p.rule(12, y, 388, y)
    for number, x in ((1, 36), (2, 152), (3, 268)):
        p.box(x, 136, 84, 28, "client", f"round {number}")
        p.arrow((x - 22, 86), (x - 4, 133), dash=True)
        p.arrow((x + 84, 134), (x + 94, 88), width=6)
        if number < 3:
            p.box(x + 98, 57, 92, 28, "server", f"learns {number}")
    p.lines(76, 104, "all of its|batches")
    p.text(200, 203, "The next round is asked for before the server", "soft")
    p.text(200, 219, "learns from the last (dashed: it asks).", "soft")
    p.text(200, 235, "The engine carries it all.", "soft")
    p.rule(12, 250, 388, 250)
    p.text(12, 280, "Streams", size=17, at="start", bold=True)
    p.text(388, 280, "Flower", "soft", at="end")
    p.text(12, 302, "server", "t-server", at="start", bold=True)
    p.text(12, 420, "client", "t-client", at="start", bold=True)
    for number in range(1, 10):
        x = 36 + 36 * (number - 1)
        p.box(x, 376, 34, 28, "client", str(number))
        p.arrow((x + 34, 375), (x + 42, 340))
        if number < 9:
            p.box(x + 40, 310, 34, 28, "server", str(number))
    p.text(200, 438, "The engine starts the processes. Batches go to", "soft")
    p.text(200, 454, "halfpass’s own port, each when it is ready.", "soft")
    return p


PICTURES = (
    how_a_batch_travels, time_lines, where_to_cut, topologies, thin_uplink, what_survives, who_sees_what,
    rounds_and_streams,
)  # fmt: skip


def drawn() -> dict[str, str]:
    """The text of each file, by its name."""
    return {f"{picture.__name__.replace('_', '-')}.svg": picture().svg() for picture in PICTURES}


if __name__ == "__main__":
    for name, svg in drawn().items():
        (Path(__file__).parent / name).write_text(svg, encoding="utf-8")
