import pytest

from fourmill.ingest.robots import agent_names, refusal

US = agent_names("fourmill/0.1 (image dataset builder)")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], None),
        ([""], None),
        (["all"], None),
        (["noai"], "noai"),
        (["NoImageAI"], "noimageai"),
        (["nofollow, noindex"], "noindex"),
        (["none"], "none"),
        (["nosnippet , noimageindex"], "noimageindex"),
        (["nofollow", "noai"], "noai"),
        (["*: noai"], "noai"),
        (["fourmill: noai"], "noai"),
        (["FourMill/2: nofollow, noai"], "noai"),
        (["otherbot: noai"], None),
        (["otherbot: nofollow, noai, noindex"], None),
        (["otherbot: noai", "noindex"], "noindex"),
        (["otherbot: nofollow, fourmill: noai"], "noai"),
        (["noai, otherbot: noindex"], "noai"),
        (["max-snippet: 50, noai"], "noai"),
        (["max-image-preview: large"], None),
        (["unavailable_after: Sat, 25 Jun 2033 15:00:00 GMT, noai"], "noai"),
        (["noai: because"], "noai"),
        (["noaim, indexnot"], None),
    ],
)
def test_directives_count_when_they_are_for_everybody_or_for_us(lines: list[str], said: str | None) -> None:
    assert refusal(lines, US) == said


@pytest.mark.parametrize(
    ("user_agent", "names"),
    [
        ("fourmill/0.1 (image dataset builder)", {"*", "fourmill"}),
        ("Mozilla/5.0 (compatible; MyBot/1.0; +https://example.org)", {"*", "mozilla", "mybot"}),
        ("plain", {"*", "plain"}),
    ],
)
def test_a_client_is_addressed_by_its_product_names(user_agent: str, names: set[str]) -> None:
    assert names <= agent_names(user_agent)
