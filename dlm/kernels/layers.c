/* Attention, and all layers of a pass in one call, whose threads stay together from the first to the last.

   Shapes: N tokens of a pass, M those asked about, H heads, H_kv key heads, D head size, T slots, W model width, V ids.

   Sums run in one order, whatever stands beside a token, as in `native.c`, and what no query may see adds zeros: its bits
   depend neither on its batch nor on how many further slots there are. */

#include <sched.h>
#include <time.h>

#include "native.c"

/* ---------------------------------------------------------------- threads */

typedef void (*start)(void (*)(void *), void *, unsigned, unsigned);

/* started: OpenMP's GOMP_parallel and count: its omp_get_num_threads, or NULL for one thread. joined, met: members that
   have begun, and have come to a barrier. tickets: one number for each piece of work that they share. */
struct team {
    start started;
    int (*count)(void);
    ptrdiff_t wanted, joined, met;
    ptrdiff_t *tickets;
};

struct member {
    struct team *team;
    ptrdiff_t number, threads, met, work;
};

static struct member join(struct team *team) {
    ptrdiff_t number = __atomic_fetch_add(&team->joined, 1, __ATOMIC_RELAXED);
    return (struct member){team, number, team->started ? team->count() : 1, 0, -1};
}

/* Waits for all members and begins the next piece of work. */
static void meet(struct member *me) {
    me->work++;
    if (me->threads == 1) return;
    me->met += me->threads;
    __atomic_add_fetch(&me->team->met, 1, __ATOMIC_ACQ_REL);
    for (int turns = 0; __atomic_load_n(&me->team->met, __ATOMIC_ACQUIRE) < me->met; turns++) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
        if (turns > 4000) /* the others may want this processor */
            nanosleep(&(struct timespec){0, 10000}, NULL);
        else if (turns > 2000)
            sched_yield();
    }
}

/* The next of `parts` parts of this piece of work, or `parts` where none is left. */
static ptrdiff_t next(struct member *me, ptrdiff_t parts) {
    ptrdiff_t part = __atomic_fetch_add(me->team->tickets + me->work, 1, __ATOMIC_RELAXED);
    return part < parts ? part : parts;
}

static void begin(struct team *team, void (*work)(void *), void *given) {
    if (team->started && team->wanted > 1)
        team->started(work, given, (unsigned)team->wanted, 0);
    else {
        team->started = NULL;
        work(given);
    }
}

/* ---------------------------------------------------------------- products */

static void multiply(struct member *me, const struct linear *layer, const float *x, ptrdiff_t rows, ptrdiff_t stride,
                     const float *added, float *y) {
    ptrdiff_t panels = (layer->outputs + PANEL - 1) / PANEL, parts = me->threads == 1 ? 1 : 4 * me->threads, part;
    parts = parts < panels ? parts : panels;
    while ((part = next(me, parts)) < parts) {
        ptrdiff_t to = PANEL * (panels * (part + 1) / parts);
        columns_of(layer, x, rows, stride, added, y, PANEL * (panels * part / parts), to < layer->outputs ? to : layer->outputs);
    }
}

struct job {
    struct team *team;
    const struct linear *layer;
    const float *x, *added;
    float *y;
    ptrdiff_t rows, stride;
};

static void product_member(void *given) {
    struct job *job = given;
    struct member me = join(job->team);
    meet(&me);
    multiply(&me, job->layer, job->x, job->rows, job->stride, job->added, job->y);
}

/* y (N, O) = x W^T [+ bias] [+ added] for x (N, I), or silu(gate) * up. */
void product(struct team *team, const struct linear *layer, const float *x, ptrdiff_t rows, ptrdiff_t stride,
             const float *added, float *y) {
    struct job job = {team, layer, x, added, y, rows, stride};
    begin(team, product_member, &job);
}

/* ---------------------------------------------------------------- attention */

#define ROWS 48 /* queries, of all heads that share a key, which meet the keys together */

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__)
#define MIXED(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int four_places __attribute__((vector_size(16)));
#define MIXED(a, b, i, j, k, l) __builtin_shuffle(a, b, (four_places){i, j, k, l})
#endif

/* q (N, H, D): a token's queries q_token apart; keys and values (rows, H_kv, T, D): row, head and slot so far apart;
   out (N, H D). */
struct heads {
    const float *q, *keys, *values;
    float *out;
    ptrdiff_t q_token, key_row, key_head, key_slot, value_row, value_head, value_slot, heads, kv_heads, size;
};

/* Tokens first .. first + count - 1 see the slots offset .. offset + keys - 1 of a row, where mask (count, keys) is not 0,
   its rows mask_row apart, or everywhere. */
struct piece {
    ptrdiff_t first, count, row, offset, keys, mask_row;
    const uint8_t *mask;
};

/* panel (D, PANEL) of `count` keys, 0 behind them. */
static void transposed(const float *keys, ptrdiff_t apart, ptrdiff_t count, ptrdiff_t size, float *panel) {
    ptrdiff_t whole = count == PANEL ? size / 4 * 4 : 0;
    for (ptrdiff_t d = 0; d < whole; d += 4)
        for (ptrdiff_t j = 0; j < PANEL; j += 4) {
            const float *at = keys + j * apart + d;
            four a = *(const four *)at, b = *(const four *)(at + apart), c = *(const four *)(at + 2 * apart),
                 e = *(const four *)(at + 3 * apart);
            four ab = MIXED(a, b, 0, 4, 1, 5), ce = MIXED(c, e, 0, 4, 1, 5);
            four ba = MIXED(a, b, 2, 6, 3, 7), ec = MIXED(c, e, 2, 6, 3, 7);
            float *to = panel + d * PANEL + j;
            *(four *)to = MIXED(ab, ce, 0, 1, 4, 5);
            *(four *)(to + PANEL) = MIXED(ab, ce, 2, 3, 6, 7);
            *(four *)(to + 2 * PANEL) = MIXED(ba, ec, 0, 1, 4, 5);
            *(four *)(to + 3 * PANEL) = MIXED(ba, ec, 2, 3, 6, 7);
        }
    for (ptrdiff_t d = whole; d < size; d++)
        for (ptrdiff_t j = 0; j < PANEL; j++) panel[d * PANEL + j] = j < count ? keys[j * apart + d] : 0;
}

/* Of scores (wide,), of which `keys` count where the mask says so: exp(score - the greatest), 0 elsewhere; returns 1 / sum,
   0 where nothing is seen. */
static float weighed(float *scores, ptrdiff_t keys, ptrdiff_t wide, const uint8_t *mask) {
    ptrdiff_t seen = keys;
    if (mask) {
        seen = 0;
        for (ptrdiff_t t = 0; t < keys; t++) {
            seen += mask[t] != 0;
            if (!mask[t]) scores[t] = -INFINITY;
        }
    }
    for (ptrdiff_t t = keys; t < wide; t++) scores[t] = -INFINITY;
    float parts[LANES], most = -INFINITY, sum = 0;
    for (int l = 0; l < LANES; l++) parts[l] = -INFINITY;
    for (ptrdiff_t t = 0; t < wide; t += LANES)
        for (int l = 0; l < LANES; l++) parts[l] = scores[t + l] > parts[l] ? scores[t + l] : parts[l];
    for (int l = 0; l < LANES; l++) most = parts[l] > most ? parts[l] : most;
    for (int l = 0; l < LANES; l++) parts[l] = 0;
    if (seen == 0) most = 0;
    for (ptrdiff_t t = 0; t < wide; t += LANES)
        for (int l = 0; l < LANES; l++) {
            float x = scores[t + l] - most, y = exponential(x);
            scores[t + l] = x < -87.0f ? 0 : y;
            parts[l] += scores[t + l];
        }
    for (int l = 0; l < LANES; l++) sum += parts[l];
    return seen ? 1.0f / sum : 0;
}

static ptrdiff_t padded(ptrdiff_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

/* Numbers that a thread needs for `keys` keys. */
ptrdiff_t attention_room(ptrdiff_t keys, ptrdiff_t size) {
    return ROWS * (2 * size + padded(keys) + 1) + PANEL * (size + padded(keys));
}

#define LINE 64 /* bytes that a processor fetches at once */
#define NEAR 131072 /* bytes of keys that are fetched while others are read: they fit into the second cache */

/* Rows that meet a panel; beside its inputs the lines from `ahead` on are fetched. */
static void tiled_all(const float *x, ptrdiff_t rows, ptrdiff_t stride, const float *panel, ptrdiff_t step, ptrdiff_t inputs,
                      float *y, ptrdiff_t outputs, ptrdiff_t columns, const char *ahead) {
    ptrdiff_t groups = (rows + GROUP - 1) / GROUP;
    for (ptrdiff_t g = 0; g < groups; g++) {
        ptrdiff_t row = rows * g / groups, many = rows * (g + 1) / groups - row;
        tiled(many, x + row * stride, stride, panel, step, inputs, NULL, NULL, y + row * outputs, outputs, columns,
              ahead ? ahead : (const char *)panel, ahead && !g ? LINE : 0);
    }
}

/* Queries of `count` tokens of a piece, from its token `from` on, in the heads that share one head of keys. Values are fetched
   while keys are read, and while they are read the keys of the head that is `further` on, which are read next. */
static void attend(const struct heads *all, const struct piece *piece, ptrdiff_t head, ptrdiff_t from, ptrdiff_t count,
                   ptrdiff_t further, float *room) {
    ptrdiff_t size = all->size, groups = all->heads / all->kv_heads, rows = count * groups, keys = piece->keys, wide = padded(keys);
    float *asking = room, *mixed = asking + ROWS * size, *factors = mixed + ROWS * size, *panel = factors + ROWS,
          *filled = panel + PANEL * size, *scores = filled + PANEL * wide;
    const float *key = all->keys + piece->row * all->key_row + head * all->key_head + piece->offset * all->key_slot;
    const float *value = all->values + piece->row * all->value_row + head * all->value_head + piece->offset * all->value_slot;
    float scale = 1.0f / sqrtf((float)size);
    for (ptrdiff_t r = 0; r < rows; r++) {
        const float *q = all->q + (piece->first + from + r / groups) * all->q_token + (head * groups + r % groups) * size;
        for (ptrdiff_t d = 0; d < size; d++) asking[r * size + d] = q[d] * scale;
    }
    for (ptrdiff_t t = 0; t < keys; t += PANEL) {
        transposed(key + t * all->key_slot, all->key_slot, keys - t < PANEL ? keys - t : PANEL, size, panel);
        tiled_all(asking, rows, size, panel, PANEL, size, scores + t, wide, PANEL,
                  (const char *)(value + t * all->value_slot));
    }
    for (ptrdiff_t r = 0; r < rows; r++)
        factors[r] = weighed(scores + r * wide, keys, wide,
                             piece->mask ? piece->mask + (from + r / groups) * piece->mask_row : NULL);
    const char *next_keys = (const char *)(key + further * all->key_head);
    ptrdiff_t part = keys * size * (ptrdiff_t)sizeof(float) <= NEAR ? keys * LINE : 0;
    for (ptrdiff_t d = 0; d < size; d += PANEL, next_keys += part) {
        ptrdiff_t columns = size - d < PANEL ? size - d : PANEL, step = all->value_slot;
        const float *values = value + d;
        if (columns < PANEL) { /* not beyond the last value */
            for (ptrdiff_t t = 0; t < keys; t++)
                for (ptrdiff_t c = 0; c < PANEL; c++) filled[t * PANEL + c] = c < columns ? values[t * step + c] : 0;
            values = filled, step = PANEL;
        }
        tiled_all(scores, rows, wide, values, step, keys, mixed + d, size, columns, part ? next_keys : NULL);
    }
    for (ptrdiff_t r = 0; r < rows; r++) {
        float *out = all->out + ((piece->first + from + r / groups) * all->heads + head * groups + r % groups) * size;
        for (ptrdiff_t d = 0; d < size; d++) out[d] = mixed[r * size + d] * factors[r];
    }
}

static void attend_all(struct member *me, const struct heads *all, const struct piece *pieces, ptrdiff_t count, float *room) {
    ptrdiff_t most = ROWS / (all->heads / all->kv_heads), part = next(me, PTRDIFF_MAX), before = 0;
    most = most ? most : 1;
    for (const struct piece *piece = pieces; piece < pieces + count; piece++) {
        ptrdiff_t chunks = (piece->count + most - 1) / most, parts = chunks * all->kv_heads;
        for (; part - before < parts; part = next(me, PTRDIFF_MAX)) {
            ptrdiff_t head = (part - before) / chunks, chunk = (part - before) % chunks;
            ptrdiff_t from = piece->count * chunk / chunks;
            attend(all, piece, head, from, piece->count * (chunk + 1) / chunks - from, me->threads, room);
        }
        before += parts;
    }
}

struct asked {
    struct team *team;
    const struct heads *heads;
    const struct piece *pieces;
    ptrdiff_t count, room_size;
    float *room;
};

static void attention_member(void *given) {
    struct asked *asked = given;
    struct member me = join(asked->team);
    meet(&me);
    attend_all(&me, asked->heads, asked->pieces, asked->count, asked->room + me.number * asked->room_size);
}

/* out = softmax(q k^T / sqrt(D)) v, piece by piece. */
void attention(struct team *team, const struct heads *heads, const struct piece *pieces, ptrdiff_t count, float *room,
               ptrdiff_t room_size) {
    struct asked asked = {team, heads, pieces, count, room_size, room};
    begin(team, attention_member, &asked);
}

/* ---------------------------------------------------------------- all layers */

/* queries: those of queries, keys and values together, but in the last layer of queries alone. */
struct layer {
    const float *attn_norm, *ff_norm;
    struct linear queries, kv, out, gate_up, down;
};

/* x (N, W): the embedded tokens, overwritten. slots, rows, places (N,): as `place` has them. keys, values: of each layer
   (rows, H_kv, T, D). asked (M,): the tokens of the last pieces, whose logits (M, V) are wanted, and asked_slots (M,)
   theirs. */
struct pass {
    struct team team;
    const struct layer *layers;
    const float *last_norm, *turns;
    struct linear head;
    ptrdiff_t count, heads, kv_heads, size, width, tokens, asking, queries, length, pieces_count, last_count, room_size;
    float eps, *x, *normed, *wide, *q, *mixed, *few, *room, *logits;
    const int64_t *slots, *rows, *places, *asked, *asked_slots;
    float *const *keys, *const *values;
    const struct piece *pieces, *last_pieces;
};

static void norm_all(struct member *me, const float *x, ptrdiff_t rows, const float *weight, float *y, ptrdiff_t size, float eps) {
    ptrdiff_t parts = me->threads < rows ? me->threads : rows, part;
    while ((part = next(me, parts)) < parts) {
        ptrdiff_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
        normed(x + first * size, count, size, weight, y + first * size, size, eps);
    }
}

static void place_all(struct member *me, const struct pass *p, const float *x, ptrdiff_t stride, const int64_t *slots,
                      float *q, float *keys, float *values, ptrdiff_t tokens, ptrdiff_t heads, ptrdiff_t kv_heads) {
    ptrdiff_t parts = me->threads < tokens ? me->threads : tokens, part;
    while ((part = next(me, parts)) < parts) {
        ptrdiff_t first = tokens * part / parts;
        place(x, stride, p->turns, slots, p->rows, p->places, q, keys, values, first, tokens * (part + 1) / parts - first,
              p->queries, heads, kv_heads, p->length, p->size);
    }
}

static void pass_member(void *given) {
    struct pass *p = given;
    struct member me = join(&p->team);
    ptrdiff_t turned = p->heads * p->size, held = p->kv_heads * p->size, tokens = p->tokens, width = p->width;
    float *x = p->x, *room = p->room + me.number * p->room_size;
    for (const struct layer *layer = p->layers; layer < p->layers + p->count; layer++) {
        int last = layer == p->layers + p->count - 1;
        float *keys = p->keys[layer - p->layers], *values = p->values[layer - p->layers];
        struct heads heads = {p->q, keys, values, p->mixed, turned, held * p->length, p->length * p->size, p->size,
                              held * p->length, p->length * p->size, p->size, p->heads, p->kv_heads, p->size};
        meet(&me);
        norm_all(&me, x, tokens, layer->attn_norm, p->normed, width, p->eps);
        meet(&me);
        if (!last) {
            multiply(&me, &layer->queries, p->normed, tokens, width, NULL, p->wide);
            meet(&me);
            place_all(&me, p, p->wide, turned + 2 * held, p->slots, p->q, keys, values, tokens, p->heads, p->kv_heads);
        } else {
            multiply(&me, &layer->kv, p->normed, tokens, width, NULL, p->wide);
            meet(&me);
            place_all(&me, p, p->wide, 2 * held, p->slots, p->q, keys, values, tokens, 0, p->kv_heads);
            meet(&me); /* p->wide and p->normed are free: what is asked about goes to the front */
            float *few_normed = p->few + p->asking * width;
            for (ptrdiff_t part; (part = next(&me, p->asking)) < p->asking;) {
                memcpy(p->few + part * width, x + p->asked[part] * width, width * sizeof(float));
                memcpy(few_normed + part * width, p->normed + p->asked[part] * width, width * sizeof(float));
            }
            x = p->few, tokens = p->asking;
            meet(&me);
            multiply(&me, &layer->queries, few_normed, tokens, width, NULL, p->wide);
            meet(&me);
            place_all(&me, p, p->wide, turned, p->asked_slots, p->q, p->q, p->q, tokens, p->heads, 0);
        }
        meet(&me);
        attend_all(&me, &heads, last ? p->last_pieces : p->pieces, last ? p->last_count : p->pieces_count, room);
        meet(&me);
        multiply(&me, &layer->out, p->mixed, tokens, turned, x, x);
        meet(&me);
        norm_all(&me, x, tokens, layer->ff_norm, p->normed, width, p->eps);
        meet(&me);
        multiply(&me, &layer->gate_up, p->normed, tokens, width, NULL, p->wide);
        meet(&me);
        multiply(&me, &layer->down, p->wide, tokens, layer->down.inputs, x, x);
    }
    meet(&me);
    norm_all(&me, x, tokens, p->last_norm, p->normed, width, p->eps);
    meet(&me);
    multiply(&me, &p->head, p->normed, tokens, width, NULL, p->logits);
}

/* Logits of a pass. Its tickets are 14 for each layer and 4. */
void pass(struct pass *pass) { begin(&pass->team, pass_member, pass); }
