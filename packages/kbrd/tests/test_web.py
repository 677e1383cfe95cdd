"""The page: its answers over HTTP, and a real browser where there is one."""

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from separata_kbrd import web as page
from separata_kbrd.system import System
from separata_kbrd.web import Visitors, build_app

testclient = pytest.importorskip("starlette.testclient")


@pytest.fixture
def client(system: System) -> Any:
    app = build_app(system, hosts=["localhost"])
    return testclient.TestClient(app, base_url="http://localhost")


def begin(client: Any) -> str:
    return str(client.post("/begin").json()["visitor"])


def say(client: Any, visitor: str, text: str) -> Any:
    return client.post("/say", json={"visitor": visitor, "text": text})


def test_a_message_gets_an_answer_items_and_a_picture(client: Any, system: System) -> None:
    visitor = begin(client)
    name = system.recommender.corpus.graph.catalogue.names[0]
    answer = say(client, visitor, f"I loved {name}. What else?").json()
    assert answer["text"]
    assert answer["heard"] == [name]
    assert len(answer["suggestions"]) == 5
    assert name not in answer["suggestions"]
    assert sum(weight for _, weight in answer["attention"]) == pytest.approx(1, abs=1e-3)
    picture = client.get(f"/picture/{visitor}.png")
    assert picture.headers["content-type"] == "image/png"
    assert picture.content.startswith(b"\x89PNG")


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js"])
def test_the_page_asks_no_other_address_for_anything(client: Any, path: str) -> None:
    found = client.get(path)
    assert found.status_code == 200
    assert not re.search(r"(https?:)?//[\w.-]+\.\w", found.text)
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1]", 400),
        (b'{"visitor": 1, "text": "x"}', 400),
        (b'{"visitor": "unknown", "text": "x"}', 404),
        (b"[" * 100_000, 400),
        (b'"' + b"x" * 200_001 + b'"', 413),
    ],
)
def test_wrong_requests_are_refused_in_words(client: Any, body: bytes, status: int) -> None:
    refused = client.post("/say", content=body)
    assert refused.status_code == status
    assert refused.json()["error"]


def test_other_paths_methods_and_hosts_are_refused(client: Any) -> None:
    assert client.get("/../pyproject.toml").status_code == 404
    assert client.get("/say").status_code == 405
    assert client.get("/picture/nobody.png").status_code == 404
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


def test_visitors_do_not_see_each_other_and_the_oldest_makes_room(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MOST_VISITORS", 2)
    visitors = Visitors(system)
    first, second = visitors.begin(), visitors.begin()
    name = system.recommender.corpus.graph.catalogue.names[0]
    visitors.say(first, f"I love {name}")
    assert visitors.picture(first) is not None
    assert visitors.picture(second) is None
    assert visitors.say(second, "hello")["attention"] == []  # type: ignore[index]
    visitors.say(first, "more")
    third = visitors.begin()
    assert visitors.say(second, "hello") is None
    assert visitors.say(first, "more")
    assert visitors.say(third, "hello")


def test_answers_at_the_same_time_are_those_of_one_after_another(client: Any) -> None:
    names = [begin(client) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: say(client, name, "any mystery movies?").json(), names))
    assert all(answer == found[0] for answer in found)


@pytest.fixture
def address(system: System) -> Iterator[str]:
    """The page, served in this process at a free port."""
    uvicorn = pytest.importorskip("uvicorn")
    app = build_app(system, hosts=["127.0.0.1"])
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=30)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


@pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium with its driver")
def test_a_person_asks_in_a_browser_and_sees_answer_items_and_picture(
    address: str, system: System, tmp_path: Path
) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1100,1250"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        name = system.recommender.corpus.graph.catalogue.names[0]
        look_at_the_page(browser, address, name)
        browser.save_screenshot(str(tmp_path / "page.png"))
        print(tmp_path / "page.png")
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert asked_hosts(browser.get_log("performance")) == {urlsplit(address).netloc}
    finally:
        browser.quit()


def look_at_the_page(browser: Any, address: str, name: str) -> None:
    def texts(selector: str) -> list[str]:
        return [element.text for element in browser.find_elements("css selector", selector)]

    def wait(selector: str, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(texts(selector)) < count:
            assert time.monotonic() < deadline, selector
            time.sleep(0.1)

    browser.get(address)
    for number, text in enumerate((f"I loved {name}. What else?", "<img src=x> 😀 more"), start=1):
        # Signs beyond the first plane cannot be typed by the driver.
        browser.execute_script("document.getElementById('text').value = arguments[0]", text)
        browser.find_element("id", "send").click()
        wait("#turns .bot", number)
        assert texts("#turns .you")[-1] == text
    wait("#suggestions li:not(.empty)", 5)
    assert any(name in part for part in texts("#attention li"))
    picture = browser.find_element("id", "picture")
    deadline = time.monotonic() + 30
    while not int(picture.get_property("naturalWidth")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert picture.is_displayed()
    assert not browser.find_elements("css selector", "#turns img")


def asked_hosts(log: list[dict[str, str]]) -> set[str]:
    """Every host that the page asked for something."""
    events = [json.loads(entry["message"])["message"] for entry in log]
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    found = (urlsplit(event["params"]["request"]["url"]) for event in sent)
    return {one.netloc for one in found if one.scheme in ("http", "https")}


def test_a_taken_port_and_a_wrong_one_end_in_one_line(
    command: Callable[..., Any], talking_run: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command("web", "--run", talking_run, "--port", port).refused("use")
    command("web", "--run", talking_run, "--port", 70_000).refused("port")


def test_the_program_prints_where_the_page_is_and_serves_it(
    command: Callable[..., Any], talking_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uvicorn = pytest.importorskip("uvicorn")
    served = []

    def run(server: Any, sockets: list[socket.socket]) -> None:
        served.append((server.config.app, sockets[0].getsockname()[1]))

    monkeypatch.setattr(uvicorn.Server, "run", run)
    done = command("web", "--run", talking_run, "--port", 0)
    ((app, port),) = served
    assert done.output == f"http://127.0.0.1:{port}\n"
    client = testclient.TestClient(app, base_url=f"http://127.0.0.1:{port}")
    assert client.get("/").status_code == 200
