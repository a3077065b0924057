"""Lay the page out with gradio."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from html import escape
from threading import Event
from typing import Any, NamedTuple

import gradio as gr

from ...data.labels import LabelSpace
from ..word import MOST_CHARACTERS, alphabet
from .cards import drawing_html, error_html, headline_html, legend_html, status_html
from .compare import both_html, both_status, draw_both
from .request import FIRST_PICTURES, MOST_SEED, Request, most_pictures, most_steps
from .session import Session
from .sweep import MOST_EACH, STRENGTH, draw_sweep, grid_of, sweep_html, sweep_status
from .worker import Stopped, Visitors

MOST_BUTTONS = 10  # values of a control that are shown as buttons
HIDDEN = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "multiple", "concurrency_limit": None}
# a page mixes the messages of two drawings that it waits for at once, so that an older one could be shown last
ONE_AT_A_TIME = {**HIDDEN, "trigger_mode": "always_last"}
SHOWN_STRENGTH = 2.0  # the sweep of a report ends there
# the last input of what draws counts a page's drawings
COUNT = (
    "(...values) => { window.turn = (window.turn || 0) + 1; values[values.length - 1] = window.turn; return values; }"
)
LAST_TURN = "() => window.turn || 0"

Labels = dict[str, list[gr.components.Component]]


class Inputs(NamedTuple):
    """Hold the components of a tab, by what they ask for; None where the run has no such thing."""

    labels: Labels  # by control: its value, and of a scale a box for null
    c: gr.components.Component | None
    word: gr.Textbox | None
    strength: gr.Slider | None
    gamma: gr.Slider | None
    steps: gr.Slider | None
    n: gr.Slider
    seed: gr.Number
    same: gr.Checkbox

    @property
    def components(self) -> list[gr.components.Component]:
        """All components, in one order."""
        labels = [component for components in self.labels.values() for component in components]
        return labels + [component for component in self[1:] if component is not None]

    def values(self, contents: Sequence[Any]) -> dict[str, Any]:
        """Return a request's values from those of the components, in their order."""
        rest = iter(contents)
        labels = {}
        for name, components in self.labels.items():
            value, *null = (next(rest) for _ in components)
            labels[name] = None if null and null[0] else value
        names = (name for name in self._fields[1:] if getattr(self, name) is not None)
        return {"labels": labels, "strength": 1.0, **dict(zip(names, rest, strict=True))}


def label_inputs(name: str, space: LabelSpace, first: int) -> list[gr.components.Component]:
    """Make the inputs of one control: buttons, a list of many values, or of a scale a slider and a box for null."""
    if not space.scale:
        choices = [*((value, value) for value in space.values), ("none", "")]
        kind = gr.Radio if space.size <= MOST_BUTTONS else gr.Dropdown
        return [kind(choices, value=space.values[first], label=name, elem_classes="choice")]
    low, high = space.ends
    step = (high - low) / (4 * (space.size - 1))
    slider = gr.Slider(low, high, value=float(space.values[first]), step=step, label=name, elem_classes="scale")
    gr.HTML(ticks_html(space.values), padding=False)
    return [slider, gr.Checkbox(False, label=f"no {name}: leave it to the model")]


def ticks_html(values: Sequence[str]) -> str:
    """Mark the levels of a scale below its slider, with the numbers of as many as have room."""
    last, between = len(values) - 1, -(-(len(values) - 1) // (4 if max(map(len, values)) < 5 else 2))
    marks = [f"<i style='left:{100 * i / last:g}%'></i>" for i in range(len(values))]
    shown = [i for i in range(len(values)) if i % between == 0]
    numbers = [f"<span style='left:{100 * i / last:g}%'>{escape(values[i])}</span>" for i in shown]
    return f"<div class='ticks' aria-hidden='true'>{''.join(marks + numbers)}</div>"


def condition_input(session: Session, each: bool = True) -> gr.Dropdown | None:
    """Make the choice of the prior's condition: its classes, and of a text model any prompt."""
    run = session.run
    if run.prior.classes is None:
        return None
    names = [run.prior.class_names[c] for c in run.classes]
    label = next((control.condition for control in run.config.controls if control.condition), None)
    label = label or ("prompt" if run.prior.text else "class")
    choices = [*([("each in turn", "")] if each else []), *((name, name) for name in names)]
    value = "" if each else names[len(names) // 2]
    return gr.Dropdown(choices, value=value, label=label, allow_custom_value=bool(run.prior.text), elem_classes="c")


def word_input(session: Session) -> gr.Textbox | None:
    """Make the box for a word, where the prior's classes are characters."""
    if not alphabet(session.run):
        return None
    about = "a picture for each letter, in place of the choice above; blank for that"
    return gr.Textbox("", label="word", info=about, max_length=MOST_CHARACTERS, lines=1, max_lines=1)


def more_inputs(session: Session, n: int, most: int, shared: bool = False) -> dict[str, Any]:
    """Make the inputs of strength, γ, steps, number and seed, those that are rarely turned in a drawer.

    `shared` leaves out what differs between runs: γ and the steps.
    """
    run = session.run
    components: dict[str, Any] = {"gamma": None, "steps": None}
    about = "0 the model alone, 1 as trained"
    components["strength"] = gr.Slider(0, SHOWN_STRENGTH, value=1, step=0.05, label="strength", info=about)
    if (gammas := run.config.trained_gammas) and not shared:
        components["gamma"] = gr.Slider(
            min(gammas), max(gammas), value=run.config.gamma, step=0.05, label="γ", info="how much the label counts"
        )
    components["n"] = gr.Slider(1, most, value=min(n, most), step=1, label="how many")
    with gr.Accordion("Noise and steps", open=False, elem_classes="drawer"):
        components["same"] = gr.Checkbox(True, label="same noise each time")
        components["seed"] = gr.Number(0, label="seed", precision=0, minimum=0, maximum=MOST_SEED)
        if not shared:
            steps, most = run.config.steps, most_steps(run)
            components["steps"] = gr.Slider(1, most, value=steps, step=1, label="steps", info=f"{steps} as trained")
    return components


def buttons() -> tuple[gr.Button, gr.Button]:
    """Make the buttons that draw and stop."""
    with gr.Row(elem_classes="buttons"):
        return gr.Button("Draw", variant="primary", min_width=80), gr.Button("Stop", min_width=80)


Draw = Callable[[dict[str, Any], Event], Iterator[tuple[str, Any]]]


def connect(
    visitors: Visitors, tab: str, draw: Draw, inputs: list, values: Callable[[Sequence[Any]], dict[str, Any]],
    parts: dict[str, Any], changing: Sequence[gr.components.Component], opening: Sequence[Any] = (),
) -> None:  # fmt: skip
    """Let the buttons of a tab, changes of some inputs, and what opens the tab draw.

    `draw` yields the status and the pictures of values. What asks anew ends the drawing before, and is drawn after it.
    """
    seed, status, pictures = parts["seed"], parts["status"], parts["pictures"]
    last_turn = gr.Number(0, visible=False)
    inputs = [*inputs, last_turn]

    def visitor_of(request: gr.Request) -> str:
        return f"{request.session_hash} {tab}"

    def draw_request(request: gr.Request, *contents: Any) -> Iterator[tuple[Any, Any, Any]]:
        *contents, turn = contents
        stop = visitors.begin(visitor_of(request), turn if isinstance(turn, (int, float)) else 0)
        request_values, last = values(contents), None
        if request_values.pop("same") is not True:
            request_values["seed"] = secrets.randbelow(MOST_SEED + 1)
        try:
            for last in draw(request_values, stop):
                if stop.is_set():
                    raise Stopped
                yield request_values["seed"], *last
        except Stopped:
            words = "<p class='words' role='status'>Stopped. Draw begins again.</p>"
            yield gr.skip(), words if visitors.is_last(visitor_of(request), stop) else gr.skip(), gr.skip()
        except ValueError as error:
            yield gr.skip(), error_html(error), gr.skip()

    def outdated(request: gr.Request, turn: Any) -> None:
        visitors.pass_over(visitor_of(request), turn if isinstance(turn, (int, float)) else 0)

    # the input event of a box of text leaves out what is deleted, pasted, or typed on a phone
    events = [component.change if isinstance(component, gr.Textbox) else component.input for component in changing]
    asking = [parts["go"].click, seed.submit, *events]
    # before each request: the page waits for the answer, and asks then, or as soon as the drawing before has ended
    gr.on(asking, outdated, inputs=last_turn, js=LAST_TURN, **HIDDEN)
    outputs = [seed, status, pictures]
    gr.on([*asking, *opening], draw_request, inputs=inputs, outputs=outputs, js=COUNT, **ONE_AT_A_TIME)

    def stopped(request: gr.Request) -> None:
        visitors.stop(visitor_of(request))

    parts["stop"].click(stopped, **HIDDEN)


def run_tab(visitors: Visitors, session: Session, place: int, opening: Any) -> None:
    """Lay out the tab of a run, which is drawn when it opens."""
    run, controls = session.run, session.run.policy.controls
    with gr.Row(elem_classes="board"):
        with gr.Column(scale=1, min_width=260, elem_classes="left"):
            with gr.Column(elem_classes="first"):
                labels = {name: label_inputs(name, c.space, c.space.size - 1) for name, c in controls.items()}
                c, word = condition_input(session), word_input(session)
                go, stop = buttons()
            with gr.Column(elem_classes="rest"):
                more = more_inputs(session, FIRST_PICTURES, most_pictures(run))
        with gr.Column(scale=4, min_width=300, elem_classes="right"):
            status = gr.HTML("", elem_classes="status")
            pictures = gr.HTML("", elem_classes="pictures")
            gr.HTML(legend_html(run))
    inputs = Inputs(labels, c, word, **more)

    def draw(values: dict[str, Any], stop: Event) -> Iterator[tuple[str, Any]]:
        for drawing in session.draw(Request.checked(run, values), stop):
            # the old pictures stay until there are new ones
            yield status_html(session, drawing), drawing_html(session, drawing) if drawing.prior else gr.skip()

    parts = {"seed": inputs.seed, "status": status, "pictures": pictures, "go": go, "stop": stop}
    changing = [component for component in inputs.components if component not in (inputs.seed, inputs.same)]
    connect(visitors, f"run {place}", draw, inputs.components, inputs.values, parts, changing, [opening])


def sweep_tab(visitors: Visitors, sessions: Sequence[Session]) -> None:
    """Lay out the tab of grids: one for each run, of which the chosen one is shown."""
    names = [session.name for session in sessions]
    which = gr.Dropdown(names, value=names[0], label="run", visible=len(names) > 1, elem_classes="which")
    groups = []
    for place, session in enumerate(sessions):
        with gr.Column(visible=place == 0) as group:
            sweep_of(visitors, session, place)
        groups.append(group)
    which.input(lambda name: [gr.update(visible=other == name) for other in names], which, groups, **HIDDEN)


def sweep_of(visitors: Visitors, session: Session, place: int) -> None:
    """Lay out the grid of a run."""
    names = session.run.names
    with gr.Row(elem_classes="board"):
        with gr.Column(scale=1, min_width=260, elem_classes="left"):
            with gr.Column(elem_classes="first"):
                rows = gr.Dropdown(names, value=names[0], label="rows")
                others = [*names[1:], names[0]] if len(names) > 1 else []
                columns = gr.Dropdown([*others, STRENGTH], value=[*others, STRENGTH][0], label="columns")
                c, word = condition_input(session, each=False), word_input(session)
                go, stop = buttons()
            with gr.Column(elem_classes="rest"):
                more = more_inputs(session, 2, min(MOST_EACH, most_pictures(session.run)))
        with gr.Column(scale=4, min_width=300, elem_classes="right"):
            status = gr.HTML("<p class='words'>Press Draw for the whole grid.</p>", elem_classes="status")
            pictures = gr.HTML("", elem_classes="pictures")
    inputs = Inputs({}, c, word, **more)

    def values(contents: Sequence[Any]) -> dict[str, Any]:
        return {"rows": contents[0], "columns": contents[1], **inputs.values(contents[2:])}

    def draw(values: dict[str, Any], stop: Event) -> Iterator[tuple[str, Any]]:
        sweep = grid_of(session, values.pop("rows"), values.pop("columns"), values)
        for grown in draw_sweep(session, sweep, stop):
            yield sweep_status(grown), sweep_html(session, grown) if grown.shown else gr.skip()

    parts = {"seed": inputs.seed, "status": status, "pictures": pictures, "go": go, "stop": stop}
    connect(visitors, f"sweep {place}", draw, [rows, columns, *inputs.components], values, parts, [])


def run_choice(sessions: Sequence[Session], side: int, words: str) -> tuple[gr.Dropdown, list[Labels]]:
    """Make the choice of a run for one side, and the labels of every run, of which those of the chosen are shown."""
    names, groups, labels = [session.name for session in sessions], [], []
    which = gr.Dropdown(names, value=names[side], label=f"run on the {words}")
    for place, session in enumerate(sessions):
        with gr.Column(visible=place == side, elem_classes="plain") as group:
            controls = session.run.policy.controls
            labels.append({name: label_inputs(name, c.space, c.space.size - 1) for name, c in controls.items()})
        groups.append(group)
    which.input(lambda name: [gr.update(visible=other == name) for other in names], which, groups, **HIDDEN)
    return which, labels


def compare_tab(visitors: Visitors, sessions: Sequence[Session]) -> None:
    """Lay out the tab that compares two runs."""
    names, chosen, labels = [session.name for session in sessions], [], []
    with gr.Row(elem_classes="board"):
        with gr.Column(scale=1, min_width=260, elem_classes="left"):
            with gr.Column(elem_classes="first"):
                for side, words in enumerate(("left", "right")):
                    which, labels_of_runs = run_choice(sessions, side, words)
                    chosen.append(which)
                    labels.append(labels_of_runs)
                c, word = condition_input(sessions[0]), word_input(sessions[0])
                go, stop = buttons()
            with gr.Column(elem_classes="rest"):
                most = min(most_pictures(session.run) for session in sessions)
                more = more_inputs(sessions[0], FIRST_PICTURES, most, shared=True)
        with gr.Column(scale=4, min_width=300, elem_classes="right"):
            status = gr.HTML("<p class='words'>Press Draw to compare.</p>", elem_classes="status")
            pictures = gr.HTML("", elem_classes="pictures")
    inputs = Inputs({}, c, word, **more)
    each = [
        [component for by_control in side for group in by_control.values() for component in group] for side in labels
    ]

    def values(contents: Sequence[Any]) -> dict[str, Any]:
        shared, rest = inputs.values(contents[: len(inputs.components)]), list(contents[len(inputs.components) :])
        sides = []
        for name, side in zip((rest.pop(0), rest.pop(0)), labels, strict=True):
            by_run = [
                Inputs(by_control, *[None] * 8).values([rest.pop(0) for group in by_control.values() for _ in group])
                for by_control in side
            ]
            sides.append((name, by_run))
        return {**shared, "sides": sides}

    def draw(values: dict[str, Any], stop: Event) -> Iterator[tuple[str, Any]]:
        pair, rows = [], []
        for name, by_run in values.pop("sides"):
            if name not in names:
                raise ValueError(f"there is no run {str(name)[:40]!r} on this page.")
            pair.append(sessions[names.index(name)])
            rows.append({**values, "labels": by_run[names.index(name)]["labels"], "steps": pair[-1].run.config.steps})
        for drawings in draw_both(tuple(pair), tuple(rows), stop):
            pictures = both_html(tuple(pair), drawings) if drawings[0].prior else gr.skip()
            yield both_status(tuple(pair), drawings), pictures

    parts = {"seed": inputs.seed, "status": status, "pictures": pictures, "go": go, "stop": stop}
    connect(visitors, "compare", draw, [*inputs.components, *chosen, *each[0], *each[1]], values, parts, [])


def page(sessions: Sequence[Session], visitors: Visitors) -> gr.Blocks:
    """Return the page of some runs: a tab for each, one that compares two, and one of grids."""
    with gr.Blocks(title="ctrl play", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(headline_html(sessions))
        with gr.Tabs():
            for place, session in enumerate(sessions):
                with gr.Tab(session.name) as tab:
                    run_tab(visitors, session, place, tab.select if place else blocks.load)
            if len(sessions) > 1:
                with gr.Tab("compare"):
                    compare_tab(visitors, sessions)
            with gr.Tab("sweep"):
                sweep_tab(visitors, sessions)
    return blocks
