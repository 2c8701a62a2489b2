"""Every option, in groups: model, train, transform, test, post, prepare.

Edit the defaults here, or set options on the command line: `--batch-size 4`, `--n-layers 4`,
`--transform.train.random_affine 0.2`. A default that depends on the data set is `by_dataset(MultiOrgan, GlaS)`.
"""
from FullNet import LAYER_TYPES, NETWORKS, layer_dilations
from support.command_line import (CommandLine, Option, boolean, by_dataset, float_pair, gpu_list, int_tuple, mpp_word,
                                  numbers, show, tta_mode, workers_count)
from support.script import InputError

DATASETS = by_dataset._fields                     # MultiOrgan, GlaS


# ---------------------------------------------------------------------------------------------------
# The options
# ---------------------------------------------------------------------------------------------------

DATASET = Option('MultiOrgan', str, 'data set; it decides layout, metrics and defaults (--dataset GlaS --help shows '
                                    'those of GlaS)', choices=DATASETS)

MODEL = dict(
    name=Option('FullNet', str, 'network; FCN_pooling is the ablation in the paper', choices=tuple(NETWORKS)),
    in_c=Option(3, int, 'input channels: RGB'),
    out_c=Option(3, int, 'output channels: background, inside, contour', at_least=3),
    n_layers=Option(6, int, 'layers of a dense block; 4 or 6 with hybrid dilation', at_least=1),
    growth_rate=Option(24, int, 'new channels per layer; time and memory grow with it', at_least=1),
    drop_rate=Option(0.1, float, 'dropout after each layer, 0 = off', at_least=0, below=1),
    compress_ratio=Option(0.5, float, 'share of the channels that a transition keeps', at_least=0),
    dilations=Option((1, 2, 4, 8, 16, 4, 1), int_tuple, 'dilation of each dense block', many=True),
    is_hybrid=Option(True, boolean, 'vary the dilation inside a block, against gridding'),
    layer_type=Option('basic', str, 'basic: one 3x3 convolution; bottleneck: 1x1, then 3x3', choices=LAYER_TYPES),
)

TRAIN = dict(
    data_dir=Option('./data/{dataset}', str, 'prepared data: images/, labels/, weight_maps/, mean_std.npy'),
    save_dir=Option('./experiments/{dataset}/{run}', str, 'run folder; {run} is the next free number'),
    input_size=Option(208, int, 'pixels: side of the training crops and of the validation windows', at_least=1),
    num_epochs=Option(by_dataset(300, 1000), int, 'epochs', at_least=1, flags=('--epochs',)),
    batch_size=Option(8, int, 'crops per step, in all processes together; memory grows with it', at_least=1),
    val_overlap=Option(80, int, 'pixels: overlap of the validation windows', at_least=0),
    lr=Option(by_dataset(1e-3, 5e-4), float, "Adam's learning rate", at_least=0),
    weight_decay=Option(1e-4, float, "Adam's L2 decay", at_least=0),
    log_interval=Option(50, int, 'steps of an epoch between two lines of the log', at_least=1),
    workers=Option('auto', workers_count, 'processes that load data; 0 loads in the training process; auto = '
                                          'fitting the machine'),
    gpu=Option('auto', gpu_list, 'GPU, such as 0; cpu; auto; with torchrun one for each process, such as 0,1',
               many=True),
    alpha=Option(1.0, float, 'weight of the variance term of varCE; 0 = cross entropy only', at_least=0),
    checkpoint_freq=Option(100, int, 'epochs between two kept checkpoints', at_least=1),
    start_epoch=Option(0, int, 'epochs that count as done when a new run starts', at_least=0),
    checkpoint=Option('', str, 'checkpoint to resume from', flags=('--checkpoint-path',)),
    overwrite=Option(False, boolean, 'replace the run that is in save_dir'),
    init_from=Option('', str, 'checkpoint whose weights to start from (fine-tuning)'),
    seed=Option(2019, int, 'seed of weights, shuffling, transforms and dropout', at_least=0, below=2 ** 63),
    use_weight_map=Option(True, boolean, 'weight the cross entropy; False = all weights are 1'),
    lr_schedule=Option('none', str, 'learning rate over the steps', choices=('none', 'cosine', 'onecycle')),
    warmup_epochs=Option(0.0, float, 'epochs of linear warm-up, for none and cosine', at_least=0),
    clip_grad=Option(0.0, float, 'largest norm of the gradient; 0 = not clipped', at_least=0),
    compile=Option(False, boolean, 'torch.compile, for CUDA: compiling takes minutes, its speed was not measured'),
    ema_decay=Option(0.0, float, 'decay of the weight average that is validated, such as 0.999; 0 = off',
                     at_least=0, below=1),
    val_every=Option(1, int, 'epochs between two validations', at_least=1),
    memory_efficient=Option(False, boolean, 'on the CPU, recompute features in the backward pass'),
    preview=Option(False, boolean, 'write a picture of augmented samples beside save_dir, and exit'),
    amp=Option(False, boolean, 'mixed precision: less memory; faster on GPUs and on CPUs with AMX or AVX512_BF16'),
    max_minutes=Option(0.0, float, 'end training after num_epochs or these minutes of steps, whichever comes first; '
                                   '0 = off', at_least=0),
    mpp=Option(by_dataset(0.25, 0.62), float, 'um per pixel of the training images, stored for `test.py --mpp`',
               at_least=0.001),
    checkpoint_minutes=Option(10.0, float, 'minutes between two saves of the latest checkpoint', at_least=0),
)

# The transforms of (image, weight map, ternary label), in the order of application; my_transforms.py explains their
# values. 'input_size' stands for the option of that name; `normalize` uses mean_std.npy.
TRANSFORM = by_dataset(
    MultiOrgan=dict(
        train=dict(random_resize=(0.8, 1.25), horizontal_flip=True, random_affine=0.3, random_elastic=(6, 15),
                   random_rotation=90, random_crop='input_size', label_encoding=1, to_tensor=1, normalize=True),
        val=dict(label_encoding=1, to_tensor=1, normalize=True),
        test=dict(to_tensor=1, normalize=True),
    ),
    GlaS=dict(
        train=dict(scale=238, horizontal_flip=True, random_affine=0.3, random_elastic=(6, 15),
                   random_rotation=90, random_crop='input_size', label_encoding=2, to_tensor=1, normalize=True),
        val=dict(scale=208, label_encoding=2, to_tensor=1, normalize=True),
        test=dict(scale=208, to_tensor=1, normalize=True),
    ),
)

TEST = dict(
    data_dir=Option('./data/{dataset}', str, 'folder of mean_std.npy, for checkpoints that do not carry it'),
    epoch=Option('best', str, 'checkpoint to test: best, or the number of an epoch that was kept'),
    gpu=Option('auto', gpu_list, 'GPU, such as 0; cpu; auto', many=True),
    img_dir=Option(by_dataset('./data/{dataset}/images/test_same', './data/{dataset}/images/testA'), str,
                   'folder of images, or one image'),
    label_dir=Option(by_dataset('./data/{dataset}/labels_instance/test', './data/{dataset}/labels_instance/testA'),
                     str, 'folder of instance labels; empty = no metrics'),
    tta=Option('full', tta_mode, 'test-time augmentation: full = 8 flips and rotations, flips = 4, none'),
    save_flag=Option(True, boolean, 'write probability maps and segmentations'),
    patch_size=Option(by_dataset(208, 0), int, 'pixels: side of the sliding window (input_size in validation); 0 = the '
                                               'whole image at once', at_least=0),
    overlap=Option(80, int, 'pixels: overlap of the windows (val_overlap in validation)', at_least=0),
    batch_size=Option(0, int, 'windows in one batch; 0 = 8 on a GPU, 1 on the CPU', at_least=0),
    preset=Option('published', str, 'post-processing: published = as below; best = what the checkpoint says scored '
                                    'best on its validation images', choices=('published', 'best')),
    amp=Option(False, boolean, 'mixed precision, as in training; changes probabilities by about 0.01'),
    overwrite=Option(False, boolean, 'recompute images finished with the same options and weights'),
    save_dir=Option('./experiments/{dataset}/{run}/{epoch}', str, 'folder of the results; by default in the run of '
                                                                  'the checkpoint'),
    model_path=Option('./experiments/{dataset}/{run}/checkpoints/checkpoint_{epoch}.pth.tar', str,
                      'checkpoint; by default of the newest run'),
    color_norm=Option(False, boolean, 'give images the colours of the training images, if the checkpoint has them (as '
                                      'those that come with the code)'),
    mpp=Option('', mpp_word, 'um: pixel size of the images, which are scaled to that of the training; auto = what TIFF '
                             'or OME metadata say'),
    scale_factor=Option(1.0, float, 'resize images for the network: 2 if they are 20x and it was trained at 40x',
                        at_least=0.01),
    scale_16bit=Option(None, float_pair, 'LO HI: map 16-bit images linearly from LO..HI to 8 bits', many=True),
    binary_labels=Option(False, boolean, 'masks or class maps as labels: their 8-connected components are objects'),
    max_megapixels=Option(1000, float, 'larger images are refused', at_least=0),
)

POST = dict(
    min_area=Option(by_dataset(20, 100), int, 'pixels at the size that the network sees: smaller '
                                           'components are removed', at_least=0),
    radius=Option(by_dataset(2, 4), int, 'pixels: dilation that restores what ternary_radius and label_encoding took '
                                         'off the objects in training; divided by scale_factor', at_least=0),
    # not in the published method, so off by default; scripts/study_post_processing.py measures what each gains
    inside_threshold=Option(0.0, float, 'least inside probability of an object; 0 = where inside is the most '
                                        'likely class', at_least=0, below=1),
    h_maxima=Option(0.0, float, 'split objects at maxima of the inside probability that stand out by this; 0 = off',
                    at_least=0, below=1),
)

PREPARE = dict(
    raw_dir=Option('./raw/{dataset}', str, 'the data set as downloaded; it is only read'),
    data_dir=Option('./data/{dataset}', str, 'folder of the prepared data; an earlier preparation there is replaced'),
    img_dir=Option('', str, 'your own images, instead of raw_dir'),
    label_dir=Option('', str, 'the instance labels of your own images'),
    split=Option('', str, 'JSON file {split: [names]} for your own images'),
    fractions=Option((0.7, 0.15, 0.15), numbers(3), 'without --split: shares of train, val and test', many=True),
    others=Option('', str, "where MoNuSeg images that the published split lacks go; '' = they are not used",
                  choices=('', 'train', 'val', 'test_same', 'test_diff')),
    anchor=Option('auto', str, 'image whose colours the others get, a name or a file; auto = the published one '
                               "for MoNuSeg, else none; '' = none"),
    sigma=Option(by_dataset(5.0, 20.0), float, 'pixels: width of the high weights between two objects', at_least=1e-3),
    w0=Option(10.0, float, 'upper bound of the weight between two objects', at_least=0),
    ternary_radius=Option(by_dataset(1, 2), int, 'pixels that the inside of an object loses at its edge', at_least=1),
    patch_size=Option(250, int, 'pixels: side of the training patches (MultiOrgan)', at_least=1),
    val_fraction=Option(0.2, float, 'share of the training images held out for validation (GlaS)',
                        at_least=0.01, below=1),
    seed=Option(2019, int, 'seed of a split that is drawn', at_least=0, below=2 ** 63),
    binary_labels=Option(False, boolean, 'masks or class maps as labels: their 8-connected components are objects'),
    xml_layers=Option((), tuple, 'layers of the annotation XML to draw; all if none is named', many=True),
    scale_16bit=Option(None, float_pair, 'LO HI: map 16-bit images linearly from LO..HI to 8 bits', many=True),
    max_megapixels=Option(1000, float, 'larger images are refused', at_least=0),
    workers=Option(1, int, 'processes that prepare images at the same time', at_least=1),
)

SCRIPT_GROUPS = {
    'train': dict(model=MODEL, train=TRAIN),
    'test': dict(model=MODEL, test=TEST, post=POST),
    'prepare': dict(prepare=PREPARE),
}


class Options(CommandLine):
    """The option groups of one script as dictionaries: `opt.model['n_layers']`, `opt.train['lr']`, ...

    isTrain: True for train.py, False for test.py; `script='prepare'` for prepare_data.py. `parse(argv)` reads the
    command line over the defaults. Raises InputError for values that are not allowed.
    """

    def __init__(self, isTrain=True, script=None):
        script = script or ('train' if isTrain else 'test')
        splits = {'train': ('train', 'val'), 'test': ('test',), 'prepare': ()}
        transforms = {split: by_dataset(*(values[split] for values in TRANSFORM)) for split in splits[script]}
        super().__init__(script, DATASET, SCRIPT_GROUPS[script], transforms,
                         ('--dataset', '--like') if script == 'prepare' else ('--dataset',))

    def check(self):
        if self.script != 'prepare':
            self._check_model()
        if self.script == 'train' and self.train['val_overlap'] >= self.train['input_size']:
            raise InputError(f'--val-overlap is {self.train["val_overlap"]}; expected less than '
                             f'--input-size, {self.train["input_size"]}')
        if self.script == 'train' and self.train['lr_schedule'] == 'onecycle' and self.train['warmup_epochs']:
            raise InputError(f'--warmup-epochs is {self.train["warmup_epochs"]:g}, but --lr-schedule onecycle has a '
                             f'warm-up of its own; leave it out')
        if self.script == 'test' and self.test['mpp'] and self.test['scale_factor'] != 1:
            raise InputError('--mpp and --scale-factor both say how to scale the images; leave one out')
        if self.script == 'test' and self.test['scale_factor'] != 1 and 'scale' in self.transform['test']:
            raise InputError(f'--scale-factor is {self.test["scale_factor"]:g}, but the transform scale makes the '
                             f'shorter side of any image {self.transform["test"]["scale"]} pixels; give --mpp, '
                             f'or another --transform.test.scale')
        if self.script == 'test' and 0 < self.test['patch_size'] <= self.test['overlap']:
            raise InputError(f'--overlap is {self.test["overlap"]}; expected less than '
                             f'--patch-size, {self.test["patch_size"]}')
        if self.script == 'prepare':
            self._check_prepare()

    def _check_prepare(self):
        own, split, nuclei = self.prepare['img_dir'], self.prepare['split'], self.dataset == 'MultiOrgan'
        used = {'split': own, 'fractions': own and not split, 'others': nuclei and not own,
                'val_fraction': not nuclei and not own, 'patch_size': nuclei}
        kind = 'without --img-dir' if not own else 'with --img-dir and --split' if split else 'with --img-dir'
        for name, is_used in used.items():
            if ('prepare', name) in self.given and not is_used:
                raise InputError(f'--{name.replace("_", "-")} changes nothing for {self.dataset} {kind}; leave it out')

    def _check_model(self):
        if self.model['in_c'] != 3:
            raise InputError(f'--in-c is {self.model["in_c"]}; expected 3: all images are read as RGB')
        dilations = self.model['dilations']
        if not dilations or min(dilations) < 1:
            raise InputError(f'--dilations is {show(dilations) if dilations else "empty"}; expected one or more '
                             f'numbers of at least 1')
        for dilation in dilations:
            try:
                layer_dilations(dilation, self.model['n_layers'], self.model['is_hybrid'])
            except ValueError as error:
                raise InputError(f'--dilations, --n-layers: {error}') from error
