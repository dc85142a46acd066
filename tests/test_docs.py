"""What the documentation of policies says holds: its configs build, its errors are the errors."""

import ast
import re
import textwrap
from pathlib import Path

import pytest
import yaml
from mmengine.registry import HOOKS, MODELS

import idlevit_mm  # noqa: F401  (registers backbones and hooks)

ROOT = Path(__file__).parents[1]
POLICIES = (ROOT / 'docs' / 'policies.md').read_text(encoding='utf-8')
EXAMPLES = re.findall(r'```python\n(.*?)```', POLICIES, flags=re.S)
MESSAGES = dict(re.findall(r'^\| (.+?) \| `(.+)` \|$', POLICIES.split('## Errors')[1], flags=re.M))

SWIN = 'IdleSwinTransformer'
PVT = 'IdlePyramidVisionTransformer'
VIT = 'IdleVisionTransformer'
WRONG = {
    "`type='EVit'`": dict(type=SWIN, policy=dict(type='EVit')),
    "`type='IdleViT', fuse=True`": dict(type=SWIN, policy=dict(type='IdleViT', fuse=True)),
    'SparseViT on PVT': dict(type=PVT, policy=dict(type='SparseViT')),
    "`scorer='class_query'` on Swin": dict(type=SWIN, policy=dict(scorer='class_query')),
    'EViT with `learned`': dict(type=VIT, policy=dict(type='EViT', scorer='learned')),
    'IdleViT with `class_attention`': dict(type=VIT, policy=dict(scorer='class_attention')),
    'Evo-ViT on a ViT, `keep_ratios=0.5`': dict(
        type=VIT, policy=dict(type='EvoViT'), keep_ratios=0.5
    ),
    'Evo-ViT, `rank_at=[4]`, another ratio from block 8 on': dict(
        type=VIT,
        policy=dict(type='EvoViT', rank_at=[4]),
        keep_ratios=[1.0] * 4 + [0.5] * 4 + [0.4] * 4,
    ),
    'SparseViT, `[0.5, 0.7]` in a stage': dict(
        type=SWIN, policy=dict(type='SparseViT'), keep_ratios=[[0.5, 0.7], 1.0, 1.0, 1.0]
    ),
}


def test_examples_build(subtests: pytest.Subtests) -> None:
    assert EXAMPLES
    for example in EXAMPLES:
        with subtests.test(example):
            config: dict = {}
            exec(example, config)
            backbone = MODELS.build(config['backbone'])
            policy = backbone.idle_blocks[0][0].policy
            assert type(policy).__name__ == config['backbone']['policy']['type']
            assert min(ratio for stage in backbone.keep_ratios for ratio in stage) < 1.0
            for hook in config.get('custom_hooks', ()):
                HOOKS.build(hook)


def test_all_errors_are_tried() -> None:
    assert set(MESSAGES) == set(WRONG)


def test_errors_are_as_written(subtests: pytest.Subtests) -> None:
    for case, wrong in WRONG.items():
        with subtests.test(case):
            with pytest.raises((TypeError, ValueError)) as error:
                MODELS.build(wrong)
            shortened = re.sub(r'\[0\.5(, 0\.5)+\]', '[0.5, ...]', str(error.value))
            shortened = re.sub(r'\[1\.0(, \d\.\d)+\]', '[...]', shortened)
            assert shortened == MESSAGES[case]


PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
LINK = re.compile(r'(?<!`)\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)')


def anchors(page: Path) -> set[str]:
    """What GitHub and MkDocs make of the headings of a page."""
    titles = re.findall(r'^#+ (.+)$', page.read_text(encoding='utf-8'), flags=re.M)
    plain = (re.sub(r'[^\w\s-]', '', title).strip().lower() for title in titles)
    return {re.sub(r'\s', '-', title) for title in plain}


def test_links_lead_somewhere_and_code_can_be_read(subtests: pytest.Subtests) -> None:
    for page in PAGES:
        with subtests.test(page.relative_to(ROOT).as_posix()):
            assert_links_and_code(page)


def assert_links_and_code(page: Path) -> None:
    text = page.read_text(encoding='utf-8')
    for name, anchor in LINK.findall(text):
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f'{name}#{anchor}'
    for block in re.findall(r'```python\n(.*?)```', text, flags=re.S):
        ast.parse(textwrap.dedent(block))
    for block in re.findall(r'```(?:bash|sh)\n(.*?)```', text, flags=re.S):
        for tool in re.findall(r'^(?:python|bash) ((?:tools|tests)/\S+)', block, flags=re.M):
            assert (ROOT / tool).is_file(), tool


def test_the_site_leads_to_every_page() -> None:
    site = yaml.safe_load((ROOT / 'mkdocs.yml').read_text())
    named = {page for part in site['nav'] for page in leaves(part)}
    pages = {page.relative_to(ROOT / 'docs').as_posix() for page in PAGES if 'docs' in page.parts}
    source = (ROOT / 'tools' / 'site.py').read_text(encoding='utf-8')
    api = {page for page in named if page.startswith('api/')}
    assert all(f"'{Path(page).stem}'" in source for page in api)
    assert named == pages | api | {'index.md', 'zoo.md'}


def leaves(nav: object) -> list[str]:
    """The pages below a part of the navigation."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in leaves(part)]
