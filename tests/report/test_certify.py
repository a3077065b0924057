"""The page of `ctrl certify`."""

import pytest
import torch

from ctrl_diffusion.report.certify import LISTED, Grid, digits_of, most_steps, write_certify_report


def figures(prompts=2, aim=False, kl=0.5):
    """Figures as certify.json has them."""
    steps = [{"t": 1 - i / 4, "sigma": 1 - i / 4, "kl_nats": kl * (i + 1) / 10, "kl_stderr": 0.01} for i in range(4)]
    found = {
        "base": "digits", "lora": {"file": "some/style.safetensors", "layers": 3, "biases": 0, "ranks": [4],
                                   "numbers": 9, "norm": 1.0, "notes": ["it names no alpha"], "strength": 0.8},
        "chain": {"steps": 4, "sigma_first": 1.0, "sigma_last": 0.05, "guidance": None, "image": [1, 8, 8],
                  "conditions": prompts, "drawn": False, "focus": None},
        "seed": 0, "samples": 10, "kl_nats": kl, "kl_stderr": 0.02, "kl_per_step": steps,
        "kl_per_prompt": [
            {"name": f"c = prompt {i}", "kl_nats": kl, "kl_stderr": 0.1} for i in range(prompts)
        ],
    }  # fmt: skip
    certificate = {"objective_nats": -1.25, "objective_stderr": 0.1, "log_z_nats": -0.5, "log_z_stderr": 0.05,
                   "gap_nats": 0.75, "gap_stderr": 0.125, "certified_pairs": 1, "of_pairs": 1, "uncertified": [],
                   "on_paths": None}  # fmt: skip
    row = {"score": -0.625, "score_stderr": 0.1, "best_score": None, "certificate": certificate}
    if aim:
        found |= {"aim": {"kind": aim, "name": "ink", "value": "4", "gamma": 2.0}, "prior_samples": 10,
                  "prior_score": -3.5, **row}  # fmt: skip
        rows = [{"strength": w, "kl_nats": kl, "kl_stderr": 0.02, **row} for w in (0.3, 1.0)]
        found["run"] = {"same_kl": False, "rows": rows}
    return found


def page(folder, found):
    columns = min(3, len(found["kl_per_prompt"]))
    grid = Grid(torch.zeros(2 * columns, 1, 8, 8), torch.ones(2 * columns, 1, 8, 8), 2, ["a"] * columns)
    write_certify_report(folder, found, grid, "ctrl certify digits --lora style.safetensors")
    return (folder / "report.html").read_text()


@pytest.mark.parametrize("aim", [False, "classifier", "rule"])
@pytest.mark.parametrize("prompts", [1, 2, LISTED + 5])
def test_the_page_shows_what_there_is_and_no_more(tmp_path, prompts, aim):
    text = page(tmp_path, figures(prompts, aim))
    assert "How far style.safetensors goes from its base" in text
    assert "0.50 ± 0.02" in text
    assert "It names no alpha." in text
    assert text.count("data:image/png;base64,") == 2 + (prompts > 1)
    assert (tmp_path / "prompts.png").is_file() == (prompts > 1)
    assert (f"The {LISTED} of {prompts} with the largest KL" in text) == (prompts > LISTED)
    assert ("0.75 ± 0.12" in text) == bool(aim)
    assert ("p̂(ink = 4 | x)" in text) == (aim == "classifier")
    assert ("A rating has no known largest value" in text) == (aim == "rule")
    assert ("it has less even at the largest strength" in text) == bool(aim)


@pytest.mark.parametrize(("kl", "expected"), [([0.0, 0.0], None), ([1.0, 3.0, 1.0], (1, 3)), ([1.0] * 4, (2, 4))])
def test_the_fewest_steps_with_half_of_the_kl(kl, expected):
    assert most_steps({"kl_per_step": [{"kl_nats": each} for each in kl]}) == expected


def test_a_lora_of_nothing_has_a_page(tmp_path):
    """No share of steps, and pictures of zeros."""
    text = page(tmp_path, figures(kl=0.0))
    assert "0.00 ± 0.02" in text
    assert "steps have half of it" not in text


@pytest.mark.parametrize(("error", "expected"), [(None, 2), (0.0, 2), (12.0, 2), (0.05, 3), (0.00012, 5), (1e-9, 6)])
def test_a_score_is_shown_to_two_digits_of_its_error(error, expected):
    assert digits_of(error) == expected
