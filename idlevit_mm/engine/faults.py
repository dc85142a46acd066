"""What a person can mend of the errors that a run ends with, and how."""

from __future__ import annotations

import pickle
import re
import traceback
from collections.abc import Callable
from typing import Any

from ..checkpoints import without_advice
from ..errors import UnsafeCheckpointError, UsageError, one_line, shortened

_AGAIN = 'and go on with --resume'
_SHARED = 'df -h /dev/shm; docker run --shm-size=8g'
# By what mmengine, torch or the system say; the first one that is found counts.
_REMEDIES = {
    'Number of GPUs used for current experiment': 'the config in the checkpoint was run on another '
    'number of GPUs (gpu_ids), and the learning rate would not fit: start as many processes, or '
    'add --auto-scale-lr',
    'DataLoader timed out': 'no batch was loaded for a long time: the storage hangs, or /dev/shm '
    f'is full ({_SHARED}). train_dataloader.timeout=SECONDS waits longer',
    'DataLoader worker.*(killed by|exited)|shared memory|unable to (open|allocate|write)': 'a data '
    f'loading worker failed, most likely because memory or /dev/shm is full (free -g; {_SHARED}): '
    f'lower num_workers or batch_size, {_AGAIN}',
    "out of memory|an't allocate memory|annot allocate memory|MemoryError|create a primitive|"
    "can't start new thread": 'there is not enough '
    'memory: lower batch_size, num_workers or the size of the images (Resize, RandomCrop), or '
    f'train with --amp, {_AGAIN}',
    'Too many open files|ancdata': 'too many files are open: raise the limit (ulimit -n 65536) or '
    f'lower num_workers, {_AGAIN}',
    r'expected input.* to have \d+ channels': 'the images have another number of channels than '
    'model.backbone.in_channels: LoadImageFromFile(color_type=...) and the mean of '
    'model.data_preprocessor decide how many they have',
    "^KeyError: 'inputs'": 'the pipeline of the data gives no inputs: it must end with '
    'PackDetInputs or PackSegInputs',
    'No space left|Disk quota': 'the disk is full, or /dev/shm is (df -h . /dev/shm): make room, '
    f'{_AGAIN}',
}


def naming_the_remedy(call: Callable[[], Any]) -> Any:
    """Call, and say in one line what can be done where an error is not one of the program.

    Raises:
        UsageError: In place of such an error.
    """
    try:
        return call()
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f'a checkpoint is refused: {without_advice(error)}. Download it, drop everything but '
            'its weights (python tools/model_converters/strip_checkpoint.py FILE stripped.pth), '
            'and name that file in the config'
        ) from error
    except (RuntimeError, OSError, MemoryError, KeyError) as error:
        text = f'{type(error).__name__}: {error}'
        for sign, remedy in _REMEDIES.items():
            if re.search(sign, text):
                raise UsageError(f'{remedy} ({one_line(error, 200)}{_images(error)})') from error
        raise


def _images(error: BaseException) -> str:
    """Files and sizes of the images of the batch that an error came up with."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        batch = frame.f_locals.get('data_batch')
        samples = batch.get('data_samples') if isinstance(batch, dict) else None
        if isinstance(samples, (list, tuple)):
            named = [one for one in samples if getattr(one, 'img_path', None)]
            sizes = ['x'.join(map(str, one.get('img_shape', ())[1::-1])) for one in named]
            pairs = zip(named, sizes, strict=True)
            return '; the batch: ' + shortened([f'{one.img_path} ({size})' for one, size in pairs])
    return ''
