"""Tests of the built site, which ``make docs`` writes to site/: links, anchors, and nothing from other hosts."""

import re
from urllib.parse import urlsplit

import pytest

from tests.docs.built_site import REPOSITORY, SITE_URL, Page, Site, is_remote, loaded_by_css
from tests.docs.running import ROOT

BUILT = ROOT / "site"
needs_site = pytest.mark.skipif(not (BUILT / "index.html").exists(), reason="make docs builds the site")

# Hosts that the theme's scripts name, with what they are for. No page may have what would make a script ask them.
NAMED_IN_SCRIPTS = {
    "api.github.com": "stars of a repository, with the component 'source'",
    "unpkg.com": "mermaid, for a block of that class; and ResizeObserver, for browsers of before 2020",
    "clipboardjs.com": "in a comment",
    "lunrjs.com": "in a comment",
    "tartarus.org": "in a comment",
    "bit.ly": "in a comment",
}
# Languages of the search that this site does not use; no page loads them.
UNUSED_SCRIPTS = "assets/javascripts/lunr"
_LINK = re.compile(r"(?:\]\(|href=\"|<)(https://[^)\s\">]+)")


@pytest.fixture(scope="module")
def site():
    return Site(BUILT)


@needs_site
def test_links_and_anchors_exist(site):
    assert len(site.pages) > 30
    assert list(site.broken_links()) == []


@needs_site
def test_links_to_other_hosts_are_complete_urls(site):
    targets = [(name, *link) for name, page in site.pages.items() for link in page.links if is_remote(link.target)]
    assert targets
    wrong = [target for target in targets if not re.fullmatch(r"(https://[\w.-]+\.\w+(/\S*)?|mailto:\S+)", target[2])]
    assert wrong == []


@needs_site
def test_links_to_the_repository_name_files_that_exist(site):
    links = {link.target for page in site.pages.values() for link in page.links}
    missing = [link for link in links if (path := path_in_repository(link)) and not (ROOT / path).exists()]
    assert missing == []


@needs_site
def test_pages_load_nothing_from_other_hosts(site):
    assert list(site.remote_loads()) == []


@needs_site
def test_scripts_ask_no_other_host(site):
    in_use = {path for path in BUILT.rglob("*.js") if UNUSED_SCRIPTS not in path.as_posix()}
    hosts = {host for path in in_use for host in re.findall(r"https?://([\w.-]+)", path.read_text("utf-8"))}
    assert hosts <= NAMED_IN_SCRIPTS.keys()
    assert not [name for name, page in site.pages.items() if "source" in page.components]
    assert not [name for name, page in site.pages.items() if "mermaid" in page.classes]


@needs_site
def test_pictures_have_a_text_and_both_colors(site):
    for name, page in site.pages.items():
        assert page.images_without_text == [], name
        fragments = [urlsplit(load.target).fragment for load in page.loads]
        assert fragments.count("only-light") == fragments.count("only-dark"), name


@needs_site
@pytest.mark.parametrize("file", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml", "pyproject.toml"])
def test_links_to_the_site_exist(site, file):
    links = _LINK.findall((ROOT / file).read_text("utf-8"))
    inside = [link.removeprefix(SITE_URL) for link in links if link.startswith(SITE_URL)]
    problems = {link: problem for link in inside if (problem := site.problem_of("index.html", link or "."))}
    assert problems == {}


def path_in_repository(link):
    match = re.match(re.escape(REPOSITORY) + r"/(?:blob|tree)/main/([^#?]+)", link)
    return match and match[1]


@pytest.fixture
def small(tmp_path):
    (tmp_path / "index.html").write_text('<a href="page/#one">x</a><h1 id="top">')
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text('<h1 id="one"><a href="../">x</a><a href="../#top">x</a>')
    return tmp_path


def test_small_site_is_correct(small):
    site = Site(small)
    assert list(site.broken_links()) == []
    assert list(site.remote_loads()) == []


@pytest.mark.parametrize(
    ("link", "problem"),
    [("page/#two", "no such anchor"), ("pages/", "no such page"), ("/page/", "outside"), ("#two", "no such anchor")],
)
def test_broken_link_is_reported(small, link, problem):
    (small / "more.html").write_text(f'\n<a href="{link}">x</a>')
    [broken] = Site(small).broken_links()
    assert broken.startswith(f"more.html:2: {link}: {problem}")


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://a.org/x.js"></script>',
        '<img src="//a.org/x.png">',
        '<img srcset="x.png, https://a.org/x.png 2x">',
        '<link rel="stylesheet" href="https://a.org/x.css">',
        '<link rel="preconnect" href="https://a.org">',
        '<p style="background: url(https://a.org/x.png)">',
    ],
)
def test_remote_load_is_reported(small, html):
    (small / "more.html").write_text(html)
    [load] = Site(small).remote_loads()
    assert load.startswith("more.html:1: ")


def test_remote_load_of_css_and_svg_is_reported(small):
    (small / "x.css").write_text('@import "https://a.org/x.css"; a { background: url(x.png) }')
    (small / "x.svg").write_text('<svg><style>@font-face { src: url(x) }</style><image href="https://a.org/x"/></svg>')
    assert sorted(Site(small).remote_loads()) == ["x.css: https://a.org/x.css", "x.svg: https://a.org/x"]


def test_links_are_not_loads():
    page = Page('<a href="https://a.org">x</a><link rel="canonical" href="https://b.org">')
    assert page.loads == []
    assert loaded_by_css("a { background: url('x.png') }") == ["x.png"]
