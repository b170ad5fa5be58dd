"""The Prefect UI in a real browser: the form shows the specification, and a run sent from it completes."""

import json
from contextlib import suppress

import pytest

from tasks.spec import RunSpec
from tests.integration.serving import eventually, serving, tiny_spec

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(300)]
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
FIELD = "//span[normalize-space()='{} (Optional)']/ancestor::div[contains(@class,'schema-form-property')][2]"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def page(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        # The form scrolls inside; a tall window shows all of it.
        opened = browser.new_page(viewport={"width": 1400, "height": 4600})
        opened.set_default_timeout(60_000)
        yield opened
        browser.close()


def field(page, label):
    """Find the input under a label of the form."""
    return page.locator(f"xpath={FIELD.format(label)}").locator("input, textarea").first


def submit(page):
    """Send the form. A click that comes while the form still checks itself is lost, on a busy machine."""
    from playwright.sync_api import TimeoutError as TookTooLong

    for _ in range(3):
        page.get_by_role("button", name="Submit").click()
        with suppress(TookTooLong):
            page.wait_for_url(lambda url: not url.endswith("/run"), timeout=10_000)
            return


def test_a_run_sent_from_the_form_completes_and_its_picture_is_drawn(served, page, tmp_path):
    spec = tiny_spec(served.directory)
    page.goto(f"{served.address}/deployments/deployment/{served.deployments()['train']['id']}/run")
    page.get_by_text("Optimizer steps.").first.wait_for()
    assert field(page, "Steps").input_value() == str(RunSpec().training.steps)
    assert field(page, "Path").input_value() == "elastic.training.gpt:GPTJob"
    field(page, "Settings").fill(json.dumps(spec["job"]["settings"]))
    field(page, "Source").fill(spec["data"]["source"])
    for label, value in (
        ("Steps", 6),
        ("Global Batch", 4),
        ("Virtual Ranks", 2),
        ("Workers", 2),
        ("Arena Mib", 16),
    ):
        field(page, label).fill(str(value))
    page.screenshot(path=tmp_path / "form.png")
    submit(page)
    runs = eventually(lambda: served.flow_runs("train"), 30, "the run that the form was sent for")
    ended = served.await_end(runs[0]["id"], 120)
    assert ended["state_type"] == "COMPLETED", served.logs(ended["id"])
    assert ended["parameters"]["spec"]["training"]["steps"] == 6

    page.goto(f"{served.address}/runs/flow-run/{ended['id']}")
    page.get_by_text("Completed").first.wait_for()
    page.screenshot(path=tmp_path / "run.png")
    artifact = eventually(lambda: served.artifacts(ended["id"]).get("markdown"), 20, "the summary")
    page.goto(f"{served.address}/artifacts/artifact/{artifact['id']}")
    page.locator("img[src^='data:image/png']").first.wait_for()
    page.screenshot(path=tmp_path / "summary.png")
