// Kernels of the CPU on packed rows, in float32. `native.py` compiles and calls them.
//
// Letters: B images, N tokens of a map (H * W), T active tokens of an image, M windows of a map,
// R summaries of an image (M, or none), C channels, A heads, D channels of a head (a multiple of
// 16), L slots of a window.

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float vec __attribute__((vector_size(64)));
typedef float loose __attribute__((vector_size(64), aligned(4)));
typedef int32_t ints __attribute__((vector_size(64)));

enum { LANES = 16, ROWS = 4 };
static const float HIDDEN = -1e30f;

static inline vec load(const float *x) { return *(const loose *)x; }
static inline void store(float *x, vec value) { *(loose *)x = value; }
static inline int round_up(int n) { return (n + LANES - 1) / LANES * LANES; }

static inline vec choose(ints mask, vec one, vec other) {
    return (vec)((mask & (ints)one) | (~mask & (ints)other));
}

// e ** x for x <= 0, to 2 units of the last place; NaN stays NaN.
static inline vec exponential(vec x) {
    const float magic = 12582912.0f;
    x = choose(x < -87.0f, (vec){} - 87.0f, x);
    vec power = (x * 1.44269504f + magic) - magic;
    vec r = x - power * 0.693359375f + power * 2.12194440e-4f;
    vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    ints bits = (__builtin_convertvector(power, ints) + 127) << 23;
    return y * (vec)bits;
}

static inline float sum_of(vec x) {
    float total = 0.0f;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

// How windows lie on the map, padded bottom and right and rolled up and left by `shift`.
typedef struct {
    int height, width, side, shift, rows, cols, hides;
} Layout;

typedef struct {
    int window, slot, region;
} Place;

static inline int region_of(int shifted, int padded, const Layout *l) {
    return l->shift ? (shifted >= padded - l->side) + (shifted >= padded - l->shift) : 0;
}

// Whether a window may hold several regions, which do not see one another; hidden padding is one.
static inline int is_border(int window, const Layout *l) {
    return (l->shift || l->hides) && (window / l->cols == l->rows - 1 || window % l->cols == l->cols - 1);
}

static Place place_of(int y, int x, const Layout *l) {
    int high = l->rows * l->side, wide = l->cols * l->side;
    y = (y - l->shift + high) % high;
    x = (x - l->shift + wide) % wide;
    int window = y / l->side * l->cols + x / l->side;
    int slot = y % l->side * l->side + x % l->side;
    return (Place){window, slot, 3 * region_of(y, high, l) + region_of(x, wide, l)};
}

// One window: rows of qkv that are its keys, the first `queries` of which attend.
typedef struct {
    int keys, queries;
    const float **row;
    float **out;         // of the queries; in the backward pass `grad` of the keys, too
    float **grad;
    int *slot, *region;  // slot L for a summary, which has no bias and sees all regions
    float *transposed, *weights, *grads;
} Window;

// weights (n, padded) = the columns from `first` on of rows (n) times `transposed` (depth, padded).
static void multiply(float *weights, float *const *rows, int n, int first, const float *transposed,
                     int depth, int padded, float scale) {
    for (int start = 0; start < n; start += ROWS) {
        const float *row[ROWS];
        for (int i = 0; i < ROWS; i++) row[i] = rows[start + i < n ? start + i : n - 1] + first;
        for (int j = 0; j < padded; j += LANES) {
            vec sums[ROWS] = {};
            for (int d = 0; d < depth; d++) {
                vec x = load(transposed + d * padded + j);
                for (int i = 0; i < ROWS; i++) sums[i] += x * row[i][d];
            }
            for (int i = 0; i < ROWS && start + i < n; i++)
                store(weights + (start + i) * padded + j, sums[i] * scale);
        }
    }
}

// out[i] += sum over j of weights[i * down + j * along] * rows[j], each `depth` columns from `to`
// and from `first` on.
static void combine(float *const *out, int n, int to, const float *weights, int down, int along,
                    float *const *rows, int count, int first, int depth, float scale) {
    for (int start = 0; start < n; start += ROWS) {
        const float *own[ROWS];
        for (int i = 0; i < ROWS; i++)
            own[i] = weights + (start + i < n ? start + i : n - 1) * down;
        for (int d = 0; d < depth; d += LANES) {
            vec sums[ROWS] = {};
            for (int j = 0; j < count; j++) {
                vec x = load(rows[j] + first + d);
                for (int i = 0; i < ROWS; i++) sums[i] += x * own[i][j * along];
            }
            for (int i = 0; i < ROWS && start + i < n; i++) {
                float *target = out[start + i] + to + d;
                store(target, load(target) + sums[i] * scale);
            }
        }
    }
}

static void transpose(float *out, float *const *rows, int n, int padded, int first, int depth) {
    for (int j = 0; j < n; j++)
        for (int d = 0; d < depth; d++) out[d * padded + j] = rows[j][first + d];
}

static void softmax(float *row, int keys, int padded) {
    for (int j = keys; j < padded; j++) row[j] = HIDDEN;
    vec most = load(row);
    for (int j = LANES; j < padded; j += LANES) {
        vec x = load(row + j);
        most = choose(x > most, x, most);
    }
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    vec total = {};
    for (int j = 0; j < padded; j += LANES) {
        vec x = exponential(load(row + j) - top);
        store(row + j, x);
        total += x;
    }
    vec factor = (vec){} + 1.0f / sum_of(total);
    for (int j = 0; j < padded; j += LANES) store(row + j, load(row + j) * factor);
}

// What all windows share: sizes, and the bias (A, L + 1, L + 1).
typedef struct {
    int channels, heads, depth, slots;
    const float *bias;
    float scale, apart;
} Core;

// Attention weights of a head: (queries, padded).
static void weigh(const Window *w, const Core *c, int head, int bordering) {
    int padded = round_up(w->keys), side = c->slots + 1;
    const float *bias = c->bias + head * side * side;
    float *const *rows = (float *const *)w->row;
    transpose(w->transposed, rows, w->keys, padded, c->channels + head * c->depth, c->depth);
    multiply(w->weights, rows, w->queries, head * c->depth, w->transposed, c->depth, padded,
             c->scale);
    for (int i = 0; i < w->queries; i++) {
        float *row = w->weights + i * padded;
        const float *own = bias + w->slot[i] * side;
        for (int j = 0; j < w->keys; j++) row[j] += own[w->slot[j]];
        if (bordering && w->region[i] >= 0)
            for (int j = 0; j < w->keys; j++)
                if (w->region[j] >= 0 && w->region[j] != w->region[i]) row[j] += c->apart;
        softmax(row, w->keys, padded);
    }
}

static void attend_window(const Window *w, const Core *c, int bordering) {
    int padded = round_up(w->keys);
    for (int head = 0; head < c->heads; head++) {
        weigh(w, c, head, bordering);
        combine(w->out, w->queries, head * c->depth, w->weights, padded, 1,
                (float *const *)w->row, w->keys, 2 * c->channels + head * c->depth, c->depth, 1.0f);
    }
}

// Adds to the gradients of the window's rows, and of the bias.
static void attend_window_back(const Window *w, const Core *c, int bordering, float *grad_bias) {
    int padded = round_up(w->keys), side = c->slots + 1;
    float *const *rows = (float *const *)w->row;
    for (int head = 0; head < c->heads; head++) {
        int query = head * c->depth, key = c->channels + query, value = c->channels + key;
        weigh(w, c, head, bordering);
        combine(w->grad, w->keys, value, w->weights, 1, padded, w->out, w->queries, query, c->depth,
                1.0f);
        transpose(w->transposed, rows, w->keys, padded, value, c->depth);
        multiply(w->grads, w->out, w->queries, query, w->transposed, c->depth, padded, 1.0f);
        for (int i = 0; i < w->queries; i++) {
            float *grads = w->grads + i * padded, *own = w->weights + i * padded, total = 0.0f;
            float *bias = grad_bias + (head * side + w->slot[i]) * side;
            for (int j = 0; j < w->keys; j++) total += own[j] * grads[j];
            for (int j = 0; j < w->keys; j++) {
                grads[j] = own[j] * (grads[j] - total);
                bias[w->slot[j]] += grads[j];
            }
        }
        combine(w->grad, w->queries, query, w->grads, padded, 1, rows, w->keys, key, c->depth,
                c->scale);
        combine(w->grad, w->keys, key, w->grads, 1, padded, rows, w->queries, query, c->depth,
                c->scale);
    }
}

// Active tokens of all windows, in their order: where those of each begin (B * M + 1), which row.
static void sort_rows(const int64_t *ids, int batch, int count, int windows, const Layout *l,
                      int *starts, int *order, Place *places) {
    memset(starts, 0, sizeof(int) * (batch * windows + 1));
    for (int b = 0; b < batch; b++)
        for (int t = 0; t < count; t++) {
            int row = b * count + t, id = ids ? (int)ids[row] : t;
            places[row].window = -1;
            if (id < 0) continue;
            places[row] = place_of(id / l->width, id % l->width, l);
            starts[b * windows + places[row].window + 1]++;
        }
    for (int i = 0; i < batch * windows; i++) starts[i + 1] += starts[i];
    for (int b = 0; b < batch; b++)
        for (int t = 0; t < count; t++) {
            int row = b * count + t;
            if (places[row].window < 0) continue;
            order[starts[b * windows + places[row].window]++] = row;
        }
    for (int i = batch * windows; i > 0; i--) starts[i] = starts[i - 1];
    starts[0] = 0;
}

static void add_key(Window *w, const float *row, float *grad, Place place) {
    w->row[w->keys] = row;
    w->grad[w->keys] = grad;
    w->slot[w->keys] = place.slot;
    w->region[w->keys++] = place.region;
}

// Slots of a window that lie outside of the map.
static int padding_of(int window, const Layout *l, Place *found) {
    int high = l->rows * l->side, wide = l->cols * l->side, number = 0;
    int top = window / l->cols * l->side, left = window % l->cols * l->side;
    if (high == l->height && wide == l->width) return 0;
    for (int slot = 0; slot < l->side * l->side; slot++) {
        int y = (top + slot / l->side + l->shift) % high;
        int x = (left + slot % l->side + l->shift) % wide;
        if (y >= l->height || x >= l->width) found[number++] = place_of(y, x, l);
    }
    return number;
}

// Attention in windows of packed rows (B, T + R, 3 * C): adds to out (B, T + R, C). Ids (B, T) of the
// tokens, -1 for padding, NULL where all are there; blank (3 * C), what padding is as a key unless
// `hides`; bias (A, L + 1, L + 1), 0 for summaries; apart is added to logits of pairs in two regions.
// Where there is grad_qkv, out is the gradient of what was attended, and the gradients
// (B, T + R, 3 * C), (3 * C,) and (A, L + 1, L + 1) are added to.
int attend(const float *qkv, const float *blank, const float *bias, float *out, float *grad_qkv,
           float *grad_blank, float *grad_bias, const int64_t *ids, int batch, int count, int total,
           int height, int width, int side, int shift, int heads, int hides, int channels,
           float scale, float apart) {
    int rows = (height + side - 1) / side, cols = (width + side - 1) / side;
    Layout l = {height, width, side, shift, rows, cols, hides};
    int windows = l.rows * l.cols, slots = side * side, summarised = total > count;
    Core core = {channels, heads, channels / heads, slots, bias, scale, apart};
    int failed = 0, threads = omp_get_max_threads(), most = slots + 1, padded = round_up(most);
    int pairs = grad_qkv ? heads * most * most : 0, spread = pairs + (grad_qkv ? 3 * channels : 0);
    int *starts = malloc(sizeof(int) * (batch * windows + 1));
    int *order = malloc(sizeof(int) * batch * count);
    int *numbers = malloc(sizeof(int) * windows);
    Place *places = malloc(sizeof(Place) * batch * count);
    // Of each thread: gradients of the bias and of padding.
    float *shared = calloc((size_t)threads * spread + 1, sizeof(float));
    if (!starts || !order || !numbers || !places || !shared) {
        failed = 1;
        goto end;
    }
    sort_rows(ids, batch, count, windows, &l, starts, order, places);
    // Summaries of windows at the border of a shifted map come last.
    int next = 0;
    for (int last = 0; last < 2; last++)
        for (int i = 0; i < windows; i++)
            if (is_border(i, &l) == last) numbers[i] = next++;
#pragma omp parallel num_threads(threads)
    {
        float *own_bias = shared + (size_t)omp_get_thread_num() * spread, *none = own_bias + pairs;
        Window w = {
            .row = malloc(sizeof(float *) * most),
            .out = malloc(sizeof(float *) * most),
            .grad = malloc(sizeof(float *) * most),
            .slot = malloc(sizeof(int) * most),
            .region = malloc(sizeof(int) * most),
            .transposed = calloc(core.depth * padded, sizeof(float)),
            .weights = malloc(sizeof(float) * most * padded),
            .grads = malloc(sizeof(float) * (grad_qkv ? most * padded : 1)),
        };
        Place *spare = malloc(sizeof(Place) * most);
        int ready = w.row && w.out && w.grad && w.slot && w.region && w.transposed && w.weights &&
                    w.grads && spare;
        // Always the same windows for a thread: sums of gradients do not depend on who is first.
#pragma omp for schedule(static, 8)
        for (int i = 0; i < batch * windows; i++) {
            int image = i / windows, window = i % windows, left = slots;
            if (!ready) failed = 1;
            if (!ready || (starts[i] == starts[i + 1] && !summarised)) continue;
            w.keys = 0;
            for (int j = starts[i]; j < starts[i + 1]; j++, left--) {
                int64_t row = order[j] + (int64_t)image * (total - count);
                w.out[w.keys] = out + row * channels;
                add_key(&w, qkv + row * 3 * channels, grad_qkv + row * 3 * channels,
                        places[order[j]]);
            }
            int padding = padding_of(window, &l, spare);
            if (summarised && left > padding) {
                int64_t row = (int64_t)image * total + count + numbers[window];
                w.out[w.keys] = out + row * channels;
                add_key(&w, qkv + row * 3 * channels, grad_qkv + row * 3 * channels,
                        (Place){window, slots, -1});
            }
            w.queries = w.keys;
            for (int j = 0; j < padding && !hides; j++) add_key(&w, blank, none, spare[j]);
            if (grad_qkv)
                attend_window_back(&w, &core, is_border(window, &l), own_bias);
            else
                attend_window(&w, &core, is_border(window, &l));
        }
        free(w.row), free(w.out), free(w.grad), free(w.slot), free(w.region);
        free(w.transposed), free(w.weights), free(w.grads), free(spare);
    }
    for (int t = 0; t < threads && grad_qkv; t++) {
        const float *own = shared + (size_t)t * spread;
        for (int i = 0; i < pairs; i++) grad_bias[i] += own[i];
        for (int i = 0; i < 3 * channels; i++) grad_blank[i] += own[pairs + i];
    }
end:
    free(starts), free(order), free(numbers), free(places), free(shared);
    return failed;
}

// Depth-wise convolution of packed rows (B, T, C), by ids (B, T), by weight (side * side, C):
// (B, T, C). In the places of idle tokens stands blank (B, R, C), that of the token's cell (N) where
// there are cells, or zeros where it is NULL. R is summaries.
int convolve(const float *x, const float *blank, const float *weight, const float *bias, float *out,
             const int64_t *ids, const int64_t *cells, int batch, int count, int height, int width,
             int side, int channels, int summaries) {
    enum { BLOCK = 64 };
    int half = side / 2, taps = side * side, wide = width + 2 * half;
    int64_t area = (int64_t)(height + 2 * half) * wide;
    // The features in each place of the map and of a rim of zeros around it.
    const float **map = malloc(sizeof(float *) * batch * area);
    float *zeros = calloc(channels, sizeof(float));
    if (!map || !zeros) return free(map), free(zeros), 1;
    for (int64_t place = 0; place < batch * area; place++) map[place] = zeros;
    for (int y = 0; blank && y < batch * height; y++) {
        int64_t start = y / height * area + (int64_t)(y % height + half) * wide + half;
        const int64_t *cell = cells ? cells + y % height * width : NULL;
        for (int i = 0; i < width; i++)
            map[start + i] = blank + (y / height * summaries + (cell ? cell[i] : 0)) * channels;
    }
    int64_t *places = malloc(sizeof(int64_t) * batch * count);
    if (!places) return free(map), free(zeros), 1;
    for (int row = 0; row < batch * count; row++) {
        int id = (int)ids[row], y = id / width;
        places[row] = row / count * area + (int64_t)y * wide + id - y * width;
        map[places[row] + half * wide + half] = x + (int64_t)row * channels;
    }
#pragma omp parallel for schedule(static)
    for (int first = 0; first < batch * count; first += BLOCK) {
        int rows = batch * count - first < BLOCK ? batch * count - first : BLOCK;
        const float *from[BLOCK * taps];
        for (int i = 0; i < rows; i++)
            for (int y = 0; y < side; y++)
                memcpy(from + i * taps + y * side, map + places[first + i] + y * wide,
                       sizeof(float *) * side);
        int c = 0;
        // Weights stay in registers for all rows of a block.
        for (; side == 3 && c + LANES <= channels; c += LANES) {
            vec by[9], start = bias ? load(bias + c) : (vec){};
            for (int tap = 0; tap < 9; tap++) by[tap] = load(weight + tap * channels + c);
            for (int i = 0; i < rows; i++) {
                vec sum = start;
                for (int tap = 0; tap < 9; tap++) sum += load(from[i * 9 + tap] + c) * by[tap];
                store(out + (int64_t)(first + i) * channels + c, sum);
            }
        }
        for (int i = 0; i < rows; i++)
            for (int rest = c; rest < channels; rest++) {
                float sum = bias ? bias[rest] : 0.0f;
                for (int tap = 0; tap < taps; tap++)
                    sum += from[i * taps + tap][rest] * weight[tap * channels + rest];
                out[(int64_t)(first + i) * channels + rest] = sum;
            }
    }
    free(map), free(zeros), free(places);
    return 0;
}

// Euclidean distance of tokens (B, N, C) from one of their map (B, C): (B, N).
int distance(const float *x, const float *other, float *out, int batch, int count, int channels) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < (int64_t)batch * count; row++) {
        const float *from = x + row * channels, *to = other + row / count * channels;
        vec sums = {};
        int c = 0;
        for (; c + LANES <= channels; c += LANES) {
            vec gap = load(from + c) - load(to + c);
            sums += gap * gap;
        }
        float total = sum_of(sums);
        for (; c < channels; c++) total += (from[c] - to[c]) * (from[c] - to[c]);
        out[row] = sqrtf(total);
    }
    return 0;
}

// Bits of a number in the order of numbers, NaN first of all and both zeros alike.
static inline uint32_t key_of(float x) {
    uint32_t bits;
    if (x != x) return UINT32_MAX;
    x += 0.0f;
    memcpy(&bits, &x, sizeof bits);
    return bits ^ (bits >> 31 ? UINT32_MAX : 1u << 31);
}

// The `count` best of each row of scores (B, U), the first of equal ones, ascending: (B, count).
int best(const float *scores, int64_t *out, int batch, int units, int count) {
    enum { BITS = 11, BINS = 1 << BITS };
#pragma omp parallel for schedule(static)
    for (int b = 0; b < batch; b++) {
        const float *own = scores + (int64_t)b * units;
        // Digit by digit: the key of the last one that is taken, and how many of equals are.
        uint32_t prefix = 0, known = 0;
        int left = count, numbers[BINS];
        for (int shift = 32 - BITS; known != UINT32_MAX; shift = shift > BITS ? shift - BITS : 0) {
            uint32_t digits = (uint32_t)(BINS - 1) << shift & ~known;
            memset(numbers, 0, sizeof numbers);
            for (int u = 0; u < units; u++) {
                uint32_t key = key_of(own[u]);
                if ((key & known) == prefix) numbers[(key & digits) >> shift]++;
            }
            int bin = BINS - 1;
            while (bin > 0 && numbers[bin] < left) left -= numbers[bin--];
            prefix |= (uint32_t)bin << shift;
            known |= digits;
        }
        int64_t *to = out + (int64_t)b * count;
        for (int u = 0, found = 0; u < units && found < count; u++) {
            uint32_t key = key_of(own[u]);
            if (key > prefix || (key == prefix && left-- > 0)) to[found++] = u;
        }
    }
    return 0;
}

// Write rows (B, T, C) to their places (B, T) in x (B, S, C); those of padding, -1, are dropped.
int put(float *x, const int64_t *ids, const float *rows, int batch, int count, int total,
        int channels) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < (int64_t)batch * count; row++)
        if (ids[row] >= 0)
            memcpy(x + (row / count * total + ids[row]) * channels, rows + row * channels,
                   sizeof(float) * channels);
    return 0;
}
