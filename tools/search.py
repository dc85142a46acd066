"""Find the keep ratios that do the least damage under a budget of time or of multiply-adds.

What each unit (stage, pair of blocks or block) costs and does at each ratio is measured alone. The
best schedules of the whole space under sums of these tables are found exactly; a few of them are
then timed and tested themselves. docs/deploy.md explains every step.
"""

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from idlevit_mm.analysis import search
from idlevit_mm.analysis.flops import pretty
from idlevit_mm.analysis.models import idle_backbone
from idlevit_mm.analysis.results import Line, add_line, exit_code
from idlevit_mm.engine.launch import load_config
from idlevit_mm.engine.swap import target_of, write_heir
from idlevit_mm.errors import UsageError

# What tools of analysis share.
sys.path.append(str(Path(sys.path[0], 'analysis_tools')))
from tables import PROXIES, Tables
from trials import Trials, add_options

# One bad timing must not rule out all that is near.
STEP = 0.95


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    add = parser.add_argument
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument('--latency', metavar='T', help='share of keep 1.0, or time: 0.7x, 25ms')
    budget.add_argument('--multiply-adds', metavar='N', help='share, or number: 0.67x, 12G')
    add('--per', default='stage', choices=search.PER, help='what gets a ratio of its own')
    nine = [tenths / 10 for tenths in range(2, 11)]
    add('--ratios', nargs='+', type=float, default=nine, help='to choose from, beside 1.0')
    few = 'shares of the tokens that may attend, 0 for none: each ratio with all and with these'
    add('--attention', nargs='+', type=float, default=[], metavar='RATIO', help=few)
    order = 'falling: within a stage ratios must not rise, as in SparseViT'
    add('--order', default='falling', choices=('falling', 'free'), help=order)
    proxy = 'distance: of features to those at 1.0; loss, metric: what is lost of it'
    add('--proxy', default='distance', choices=PROXIES, help=proxy)
    add('--candidates', type=int, default=3, help='to test of those that meet the budget')
    spread = 'schedules of the whole front to test besides, for the error of the tables'
    add('--spread', type=int, default=4, help=spread)
    add('--trials', type=int, default=0, help='tests that optuna may spend on the space besides')
    out = 'config to write; .jsonl and .png are written beside it (default: in the work dir)'
    add('--out', help=out)
    add('--force', action='store_true', help='replace a config that exists')
    return parser.parse_args(argv)


class Point(NamedTuple):
    """A schedule and what the tables say of it.

    Attributes:
        keep: Its ratios.
        cost: Share of the cost of keep 1.0.
        damage: By the proxy.
    """

    keep: Any
    cost: float
    damage: float


class Search:
    """Looks for schedules under ``cap``, a share of the cost of keep 1.0, and tests them."""

    def __init__(self, tables: Tables, args: argparse.Namespace, cap: float) -> None:
        self.tables, self.args, self.cap = tables, args, cap
        self.space = tables.space
        self.front = search.best_schedules(self.space, tables.cost, tables.damage)
        self.points = [
            Point(self.space.keep_ratios(choice), 1 + cost, damage)
            for cost, damage, choice in zip(*self.front, strict=True)
        ]

    def point(self, choice: Sequence[int]) -> Point:
        """A choice as the tables see it."""
        places = range(len(choice)), choice
        cost, damage = self.tables.cost[places].sum(), self.tables.damage[places].sum()
        return Point(self.space.keep_ratios(choice), 1 + cost, damage)

    def uniform(self) -> list[Point]:
        """One ratio for all blocks, falling."""
        tables = self.tables.cost, self.tables.damage
        (ratios, costs), (_, damages) = (search.uniform_schedules(self.space, t) for t in tables)
        keeps: Any = map(float, ratios)
        if self.space.attention:
            keeps = [dict(keep_ratios=ratio, attention_ratios=1.0) for ratio in keeps]
        figures = map(float, 1 + costs), map(float, damages)
        return [Point(*own) for own in zip(keeps, *figures, strict=True)]

    def checked(self, name: str, point: Point, figures: Line) -> Line:
        """A line of what was predicted of a schedule, and what is so."""
        predicted = dict(predicted_cost=point.cost, predicted_damage=point.damage)
        own = dict(damage=self.tables.damages([point.keep])[0], **self.tables.score(point.keep))
        own |= dict(kind='checked', name=name, keep_ratios=point.keep, **predicted, **figures)
        add_line(own, self.tables.path)
        cost = f'{own["time"]:.3f} of its time, {own["operations"]:.3f} of its multiply-adds'
        print(
            f'{name} {plain(point.keep)}: {own["score_name"]} {own["score"]:.4g}, {cost}',
            flush=True,
        )
        return own

    def within(self, name: str, pool: Iterable[Point], count: int) -> tuple[list[Line], list[Line]]:
        """The first few points of a pool, the dearest first, that meet the budget; and misses.

        After a miss, points are asked that are cheaper by what was missed, in small steps.
        """
        limit, met, missed = self.cap, list[Line](), list[Line]()
        for point in pool:
            if len(met) == count or len(missed) == 5 * count:
                break
            if point.cost > limit:
                continue
            figures = self.tables.measured(point.keep)
            share = self.share(figures)
            if share <= self.cap:
                met.append(self.checked(name, point, figures))
                continue
            print(f'{name} {plain(point.keep)} costs {share:.3f}, not {point.cost:.3f}: too much')
            missed.append(dict(keep_ratios=point.keep, share=share))
            limit = point.cost * max(self.cap / share, STEP)
        return met, missed

    def share(self, figures: Line) -> float:
        """The measured cost that the budget is about, as a share of that of keep 1.0."""
        if self.args.latency is None:
            return figures['operations']
        absolute = self.args.latency.endswith('s')
        return figures['ms'] / 1e3 / self.tables.whole[0] if absolute else figures['time']

    def explored(self, first: Iterable[Sequence[int]]) -> list[list[int]]:
        """What optuna finds by testing, the best first; it begins with some choices."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        units, top = len(self.space.units), len(self.space.options) - 1

        def choice_of(trial: Any) -> list[int]:
            return self.space.legal([trial.params[f'unit {u}'] for u in range(units)])

        def test(trial: Any) -> float:
            for unit in range(units):
                trial.suggest_int(f'unit {unit}', 0, top)
            point = self.point(choice_of(trial))
            trial.set_constraint('budget', point.cost - self.cap)
            if point.cost > self.cap:
                raise optuna.TrialPruned
            return self.tables.score(point.keep)['score']

        sampler = optuna.samplers.TPESampler(seed=0)
        # Tests that were done before are in the file of lines.
        study = optuna.create_study(direction='maximize', sampler=sampler)
        for choice in first:
            study.enqueue_trial({f'unit {unit}': int(index) for unit, index in enumerate(choice)})
        done = optuna.trial.TrialState.COMPLETE
        enough = optuna.study.MaxTrialsCallback(self.args.trials, states=(done,))
        study.optimize(test, n_trials=50 * self.args.trials, callbacks=[enough])
        tested = study.get_trials(states=(done,))
        return [choice_of(t) for t in sorted(tested, key=lambda t: t.values, reverse=True)]


def plain(keep: Any) -> Any:
    """Ratios of blocks as short as a config can have them."""
    if isinstance(keep, float):
        return keep
    if isinstance(keep, dict):
        return {name: plain(table) for name, table in keep.items()}
    return [own[0] if len(set(own)) == 1 else own for own in keep]


def report(lines: Sequence[Line]) -> str:
    """A row for each schedule that was tested, and how far the tables are off."""
    table = pd.DataFrame(lines)
    share = table['share']
    rows = {
        '': table['name'],
        'keep ratios': [str(plain(keep)) for keep in table['keep_ratios']],
        lines[0]['score_name']: table['score'].map('{:.4g}'.format),
        'ms': table['ms'].map('{:.1f}'.format),
        'time / keep 1.0': table['time'].map('{:.3f}'.format),
        'multiply-adds': table['multiply_adds'].map(pretty),
        'share': table['operations'].map('{:.3f}'.format),
        'cost, predicted': table['predicted_cost'].map('{:.3f}'.format),
        'damage': table['damage'].map('{:.4f}'.format),
        'damage, predicted': table['predicted_damage'].map('{:.4f}'.format),
    }
    off = (table['predicted_cost'] / share - 1).abs()
    table['lost'] = -table['score']
    ranks = table[['predicted_damage', 'damage', 'lost']].rank().corr()['predicted_damage']
    return (
        f'{pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)}\n\n'
        f'Of {len(lines)} schedules: the predicted cost is off by {off.mean():.1%} in the mean, '
        f'{off.max():.1%} at most; the rank correlation of the predicted damage is '
        f'{ranks["damage"]:.2f} with the measured one and {ranks["lost"]:.2f} with what is lost.'
    )


def plot(found: Search, lines: Sequence[Line], path: Path) -> None:
    """Draw damage over cost as they are predicted, and scores over what is measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout='constrained')
    left, right = figure.subplots(1, 2)
    for points, label in ((found.points, 'front of the space'), (found.uniform(), 'one ratio')):
        left.plot([p.cost for p in points], [p.damage for p in points], label=label)
    for number, (name, own) in enumerate(pd.DataFrame(lines).groupby('name', sort=False)):
        style = dict(marker='o', linestyle='', color=f'C{number + 2}')
        left.plot(own['predicted_cost'], own['damage'], label=f'{name}, measured', **style)
        right.plot(own['share'], own['score'], label=name, **style)
    for axes, label in ((left, found.args.proxy), (right, lines[0]['score_name'])):
        axes.axvline(found.cap, color='0.7', linestyle='--', label='budget')
        axes.set(xlabel='cost, share of keep 1.0', ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def write_config(args: argparse.Namespace, keep: Any, out: Path, trials: Trials) -> None:
    """Write the config with the ratios that were found."""
    config, budget = Path(args.config).absolute(), args.latency or args.multiply_adds
    before, wanted = load_config(args.config).to_dict(), trials.cfg.to_dict()
    own, ratios = wanted['model']['backbone'], plain(keep)
    if isinstance(ratios, dict):
        attending, ratios = ratios['attention_ratios'], ratios['keep_ratios']
        own['policy'] = dict(own.get('policy') or {}, attention_ratios=attending)
        if policy := before['model']['backbone'].get('policy'):
            policy['attention_ratios'] = None
    own['keep_ratios'] = ratios
    # The images that a search looks at are not those that the model is tested on ever after.
    wanted |= {key: before[key] for key in ('test_dataloader', 'test_evaluator') if key in before}
    # Lists are replaced as a whole.
    before['model']['backbone']['keep_ratios'] = None
    write_heir(config, out, before, wanted, f'{config.name} for {budget}, by tools/search.py')


@exit_code
def main(argv: Sequence[str] | None = None) -> None:
    """Search, test, write."""
    args = parse_args(argv)
    option = '--latency' if args.multiply_adds is None else '--multiply-adds'
    text = args.latency or args.multiply_adds
    units = ('ms', 's') if args.latency else ('M', 'G', 'T')
    budget, relative = search.parse_budget(option, text, units)
    if min(args.candidates, args.spread + 1, args.trials + 1) < 1:
        raise UsageError('--candidates must be at least 1, --spread and --trials at least 0')
    if args.trials and importlib.util.find_spec('optuna') is None:
        raise UsageError('--trials needs optuna: pip install "idlevit_mm[search]"')
    trials = Trials(args)
    out = target_of(
        Path(args.config).absolute(), args.out or str(trials.work_dir / 'found.py'), args.force
    )
    depths = idle_backbone(trials.model).depths
    policy = trials.cfg.model.backbone.get('policy')
    if args.attention and isinstance(policy, str):
        raise UsageError(
            f'--attention: policy={policy!r} of the backbone gets an argument; allowed is '
            f'policy=dict(type={policy!r})'
        )
    falling = args.order == 'falling'
    space = search.space_of(depths, args.per, args.ratios, falling, args.attention)
    for index in range(len(space.options)):
        trials.variant(space.keep_ratios([index] * len(space.units)))
    trials.runner  # noqa: B018 (what it finds missing is said before anything is timed)
    tables = Tables(trials, space, args, out.with_suffix('.jsonl'))
    cap = budget if relative else budget / tables.whole[0 if args.latency else 1]
    own = Search(tables, args, cap)
    print(f'{space.size:,} schedules, of which the tables leave {len(own.points)} on the front')
    affordable = [p for p in own.points[::-1] if p.cost <= cap]
    if not affordable:
        least = own.points[0]
        raise UsageError(
            f'{option} {text}: no ratios meet it; the nearest are {plain(least.keep)}, predicted '
            f'to take {least.cost:.4f} of keep 1.0'
        )
    first = own.front.choices[1 + own.front.cost <= cap][::-1][: args.candidates]
    explored = map(own.point, own.explored(first) if args.trials else ())
    top = own.point([len(space.options) - 1] * len(space.units))
    dense = own.checked('keep 1', top, tables.measured(top.keep))
    met, missed = own.within('found', chain(explored, affordable), args.candidates)
    uniform, _ = own.within('uniform', own.uniform(), 1)
    places = np.linspace(0, len(own.points) - 1, args.spread + 2).astype(int)[1:-1]
    along = [own.points[at] for at in places]
    others = [own.checked('front', point, tables.measured(point.keep)) for point in along]
    if not met:
        near = min(missed, key=lambda line: line['share'])
        raise UsageError(
            f'{option} {text}: all that were tried cost more; the nearest, '
            f'{plain(near["keep_ratios"])}, takes {near["share"]:.4f} of keep 1.0'
        )
    # Of equal ones the first: one ratio for all is written only where it is better.
    best = max([*met, *uniform], key=lambda line: line['score'])
    lines = [dict(line, share=own.share(line)) for line in (dense, *met, *uniform, *others)]
    for point in own.points:
        tables.once(dict, kind='front', proxy=args.proxy, **point._asdict())
    write_config(args, best['keep_ratios'], out, trials)
    plot(own, lines, out.with_suffix('.png'))
    print('', report(lines), '', trials.origin('tools/search.py', argv), sep='\n')
    for line in uniform:
        gain = max(own['score'] for own in met) - line['score']
        print(f'\nFound against the uniform ratio {line["keep_ratios"]}: {gain:+.4g}')
    print(f'{out}: keep_ratios={plain(best["keep_ratios"])}')


if __name__ == '__main__':
    sys.exit(main())
