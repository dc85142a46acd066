"""What MkDocs asks while it builds the site: pages that are written from the code and the configs.

The model zoo comes from the metafiles, and a page of the API is a package, whose docstrings
mkdocstrings reads.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *('backbones', 'policies', 'losses', 'hooks', 'necks', 'heads', 'kernels', 'blocks'),
    *('layers', 'ops', 'converters', 'checkpoints', 'engine', 'analysis', 'visualization'),
)
# Of the repository, not of the site.
OUTSIDE = re.compile(
    r'\[([^\]]+)\]\((?:\.\./)+(?!images)(?:configs|tests|tools|README|CHANGELOG)[^)]*\)'
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are no files."""
    pages = {'zoo.md': zoo(), 'index.md': home()}
    for package in PACKAGES:
        title = f'# idlevit_mm.{package}\n\n'
        options = '    options:\n      show_submodules: true\n'
        pages[f'api/{package}.md'] = f'{title}::: idlevit_mm.{package}\n{options}'
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Keep the text of links that leave the site."""
    return OUTSIDE.sub(r'\1', markdown)


def home() -> str:
    """The README, seen from the folder of the docs."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    text = re.sub(r'\[([^\]]+)\]\((?!https?:|#|docs/)[^)]+\)', r'\1', text)
    return text.replace('](docs/', '](').replace('src="docs/', 'src="')


def zoo() -> str:
    """A table for each collection of models."""
    told = 'None for COCO and ADE20K has been trained here: [recipes](recipes.md).'
    lines = ['# Model zoo', '', f'Every config, from the metafiles. {told}']
    for name in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']:
        file = yaml.safe_load((ROOT / name).read_text(encoding='utf-8'))
        paper = file['Collections'][0].get('Paper')
        source = f' ([paper]({paper["URL"]}))' if paper else ''
        lines += ['', f'## {file["Collections"][0]["Name"]}{source}', '']
        lines += ['| config | data | length | batch | measured here |', '|---|---|---|---|---|']
        for model in file['Models']:
            facts = model['Metadata']
            length = next(f'{facts[k]} {k.lower()}' for k in ('Epochs', 'Iterations') if k in facts)
            metrics = [one['Metrics'] for one in model.get('Results', [])]
            shown = ', '.join(f'{v} {k}' for one in metrics for k, v in one.items()) or '–'
            what = f'{facts["Training Data"]} | {length} | {facts["Batch Size"]} | {shown}'
            lines.append(f'| `{model["Config"].removeprefix("configs/")}` | {what} |')
    return '\n'.join(lines) + '\n'
