"""How the text of errors is put together."""

import pytest

from idlevit_mm.errors import one_line, shortened


@pytest.mark.parametrize(
    ('items', 'options', 'text'),
    [
        ([], {}, ''),
        (['a', 'b'], {'limit': 2}, 'a, b'),
        ({'a': 1, 'b': 2, 'c': 3}, {'limit': 2}, 'a, b and 1 more'),
        ((1, 2, 3), {'limit': 1, 'separator': '; '}, '1 and 2 more'),
        ((1, 2, 3), {'separator': '; '}, '1; 2; 3'),
        (range(7), {}, '0, 1, 2, 3, 4 and 2 more'),
    ],
)
def test_shortened(items, options, text):
    assert shortened(items, **options) == text


@pytest.mark.parametrize(
    ('error', 'text'),
    [
        (ValueError('a  b\n c\n'), 'a b c'),
        (ValueError(), 'ValueError'),
        (KeyError('images'), "no key 'images'"),
        (KeyError(7), 'no key 7'),
        (KeyError('X is not in the registry'), 'X is not in the registry'),
        (KeyError(), 'KeyError'),
    ],
)
def test_one_line(error, text):
    assert one_line(error) == text


def test_long_messages_are_cut_off_where_asked():
    error = ValueError('a' * 300)
    assert one_line(error) == 'a' * 300
    assert one_line(error, 20) == 'a' * 17 + '...'
