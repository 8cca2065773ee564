// Forward passes of a Llama-like model over a ragged batch, on a CPU with AVX2, AVX-512 or AMX; called through ctypes.
#include <omp.h>
#include <sched.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "attention.h"

using harness::Word;

extern "C" {

struct HarnessLayer {
    const Word *qkv, *output, *gate_up, *down;            // packed
    const float *qkv_bias, *output_bias;                  // or null
    const float *attention_norm, *mlp_norm;               // [hidden], or null: of what goes in
    const float *attended_norm, *mlp_out_norm;            // [hidden], or null: of what comes out
    const float *query_norm, *key_norm;                   // [head_dim] or [heads * head_dim], or null
    Word *keys, *values;                                  // the cache
};

struct HarnessModel {
    std::int32_t layer_count, hidden, intermediate, heads, kv_heads, head_dim, vocab, block_size;
    std::int32_t norms_all_heads;                         // whether query_norm and key_norm are of all heads together
    std::int32_t gelu;                                    // whether the gate has GELU by tanh instead of SiLU
    float epsilon, scaling;                               // of the norms; of the scores
    float embedding_scale, residual_scale;                // of what a token begins with; of what a layer adds
    const void* embedding;                                // [vocab, hidden]
    const float* norm;                                    // [hidden]
    const Word* head;                                     // packed
    const float *cosines, *sines;                         // [positions, head_dim / 2]
    const HarnessLayer* layers;
};

struct HarnessPass {
    std::int32_t tokens, chunks, rows;
    const std::int32_t* token_ids;                        // [tokens]
    const std::int32_t *starts, *lengths;                 // [chunks]
    const std::int32_t *blocks, *block_begins;            // all chunks' blocks, and where each one's begin
    const std::int32_t* sampled;                          // [rows]: which rows of the pass get logits
    std::int64_t* next_ids;                               // [rows]: the result, -1 where no logit is a number
    float* logits;                                        // [rows, vocab], or null: also a result
};
}

namespace harness {
namespace {

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// Memory that grows and is never read before it is written.
template <class T>
class Buffer {
public:
    void hold(std::size_t count) {
        if (count <= held_) return;
        held_ = 0;
        data_.reset();
        data_.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
        if (!data_) throw std::bad_alloc();
        held_ = count;
    }
    T* get() const { return data_.get(); }

private:
    std::unique_ptr<T, Free> data_;
    std::size_t held_ = 0;
};

// Keeps each thread of a team on a core of its own while a pass is computed. Left to itself, the kernel has been seen
// to leave two of them on one core for seconds, for to it a thread that waits in a barrier is a busy one.
class Cores {
public:
    // Binds where there is a thread for each core that the caller may use, and the user does not bind.
    explicit Cores(int threads) {
        if (omp_get_proc_bind() != omp_proc_bind_false || sched_getaffinity(0, sizeof allowed_, &allowed_)) return;
        if (CPU_COUNT(&allowed_) != threads) return;
        for (int core = 0; core < CPU_SETSIZE; ++core)
            if (CPU_ISSET(core, &allowed_)) cores_.push_back(core);
    }
    // Called by each thread of the team.
    void bind() const {
        thread_local int bound = -1;
        const int thread = omp_get_thread_num();
        if (cores_.empty() || (thread && bound == cores_[thread])) return;
        bound = cores_[thread];
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(bound, &one);
        sched_setaffinity(0, sizeof one, &one);
    }
    // The calling thread is not ours, and threads that it starts inherit its cores.
    ~Cores() {
        if (!cores_.empty()) sched_setaffinity(0, sizeof allowed_, &allowed_);
    }

private:
    cpu_set_t allowed_;
    std::vector<int> cores_;
};

constexpr Word NONE = ~Word{0};  // no token's id

// What a pass consists of; library.py has their names.
enum Stage { EMBED, NORMS, QKV, ROTARY, ATTENTION, OUTPUT, GATE_UP, DOWN, HEAD, STAGES };

// Seconds of each stage, of all passes so far: the first thread's, which waits for the others at the end of each. Only
// where the library is compiled to be profiled (launch/profile_pass.py).
class Stopwatch {
public:
    void begin() {
        if (RUNS && !omp_get_thread_num()) last_ = omp_get_wtime();
    }
    void end(Stage stage) {
        if (!RUNS || omp_get_thread_num()) return;
        const double now = omp_get_wtime();
        seconds[stage] += now - last_;
        last_ = now;
    }
    double seconds[STAGES] = {};

private:
#ifdef HARNESS_STAGES
    static constexpr bool RUNS = true;
#else
    static constexpr bool RUNS = false;
#endif
    double last_ = 0;
};

class Forward {
public:
    virtual ~Forward() = default;
    Stopwatch watch;
    virtual void run(const HarnessModel& model, const HarnessPass& pass, int threads) = 0;
};

// Rows of the residual stream: all of a pass, or the sampled ones alone, which are then numbered anew.
struct Rows {
    Tiling tiling;
    const std::int32_t* chosen;  // null: all

    int at(int row) const { return chosen ? chosen[row] : row; }
};

template <class E>
class ForwardOf final : public Forward {
    using Raw = typename E::Raw;

public:
    void run(const HarnessModel& model, const HarnessPass& pass, int threads) override {
        model_ = &model;
        pass_ = &pass;
        shape_ = {model.heads, model.kv_heads, model.head_dim, model.block_size, model.scaling};
        query_width_ = model.heads * model.head_dim;
        key_width_ = model.kv_heads * model.head_dim;
        qkv_width_ = panels_of(query_width_ + 2 * key_width_) * PANEL;
        product_width_ = panels_of(model.hidden) * PANEL;
        all_ = {Tiling(pass.tokens), nullptr};
        sampled_ = {Tiling(pass.rows), pass.sampled};
        read_chunks();
        // AMX reads whole tiles of rows, whatever lies behind the last.
        const auto hold = [&](auto& buffer, std::size_t width) { buffer.hold((pass.tokens + TILE) * width); };
        hold(residual_, model.hidden);
        hold(qkv_, qkv_width_);
        hold(query_, query_width_);
        hold(product_, model.layers[0].attended_norm ? product_width_ : 0);
        hold(normed_, model.hidden / E::HELD);
        hold(attended_, query_width_ / E::HELD);
        hold(middle_, model.intermediate / E::HELD);
        best_.hold(static_cast<std::size_t>(threads) * pass.rows * LANES);
        best_id_.hold(static_cast<std::size_t>(threads) * pass.rows * LANES);
        panels_.begin(threads);
        const Cores cores(threads);
#pragma omp parallel num_threads(threads)
        {
            cores.bind();
#ifdef __AMX_BF16__
            const AmxTiles tiles;
#endif
            watch.begin();
            embed();
            watch.end(EMBED);
            for (int l = 0; l < model.layer_count; ++l) {
                // Nobody reads what the last layer gives for rows that are not sampled; only their keys and values.
                const bool few = few_ && l + 1 == model.layer_count;
                attention(model.layers[l], few);
                mlp(model.layers[l], few ? sampled_ : all_);
            }
            score_vocabulary();
            choose();
            watch.end(HEAD);
        }
    }

private:
    void read_chunks() {
        chunks_.clear();
        owner_.resize(pass_->tokens);
        position_.resize(pass_->tokens);
        for (int c = 0, row = 0; c < pass_->chunks; row += pass_->lengths[c++]) {
            const int start = pass_->starts[c];
            const std::int32_t* blocks = pass_->blocks + pass_->block_begins[c];
            chunks_.push_back({row, start, pass_->lengths[c], blocks});
            for (int i = 0; i < pass_->lengths[c]; ++i) {
                owner_[row + i] = c;
                position_[row + i] = start + i;
            }
        }
        plan(chunks_, shape_, tasks_);
        read_sampled();
    }

    // Where fewer rows are sampled than there are tokens, each becomes a chunk of its own for the last layer.
    void read_sampled() {
        number_.assign(pass_->tokens, -1);
        sampled_chunks_.clear();
        for (int r = 0; r < pass_->rows; ++r) {
            const int row = pass_->sampled[r];
            number_[row] = r;
            sampled_chunks_.push_back({r, position_[row], 1, chunks_[owner_[row]].blocks});
        }
        const auto named = std::count_if(number_.begin(), number_.end(), [](int number) { return number >= 0; });
        few_ = named == pass_->rows && pass_->rows < pass_->tokens;  // each once
        if (few_) plan(sampled_chunks_, shape_, sampled_tasks_);
    }

    Cache cache(const HarnessLayer& layer) const {
        return {layer.keys, layer.values, static_cast<std::size_t>(shape_.head_dim / E::STEP) * shape_.block_size,
                shape_.kv_heads};
    }

    int block_of(int row) const { return chunks_[owner_[row]].blocks[position_[row] / shape_.block_size]; }
    int offset_of(int row) const { return position_[row] % shape_.block_size; }
    float* residual(int row) { return residual_.get() + static_cast<std::size_t>(row) * model_->hidden; }
    Weights weights(const Word* packed, int columns, int depth) const {
        return {packed, panels_of(columns), depth / E::STEP};
    }

    void embed() {
        const int hidden = model_->hidden;
        const Floats scale = every(model_->embedding_scale);
#pragma omp for
        for (int row = 0; row < pass_->tokens; ++row) {
            const Raw* from =
                static_cast<const Raw*>(model_->embedding) + static_cast<std::size_t>(pass_->token_ids[row]) * hidden;
            for (int i = 0; i < hidden; i += LANES) store(residual(row) + i, E::load(from + i) * scale);
        }
    }

    // What a product's done() does to keep it, as rows of so many elements.
    static auto keep(float* rows, int width, const float* bias) {
        return [=](const float* sums, int start, int height, int panel) {
            for (int r = 0; r < height; ++r) {
                float* to = rows + static_cast<std::size_t>(start + r) * width + panel * PANEL;
                for (int v = 0; v < PANEL; v += LANES) {
                    Floats sum = load(sums + r * PANEL + v);
                    if (bias) sum += load(bias + panel * PANEL + v);
                    store(to + v, sum);
                }
            }
        };
    }

    // Adds a product to the residual stream, as it is or through a norm.
    void add(const Weights& matrix, const Word* tiles, const float* bias, const float* norm, const Rows& rows) {
        if (norm) {
            multiply<E>(matrix, tiles, rows.tiling, panels_, keep(product_.get(), product_width_, bias));
            return add_normalised(norm, rows);
        }
        const Floats scale = every(model_->residual_scale);
        multiply<E>(matrix, tiles, rows.tiling, panels_, [&](const float* sums, int start, int height, int panel) {
            for (int r = 0; r < height; ++r) {
                float* to = residual(rows.at(start + r)) + panel * PANEL;
                for (int v = 0; v < PANEL && panel * PANEL + v < model_->hidden; v += LANES) {
                    Floats sum = load(sums + r * PANEL + v);
                    if (bias) sum += load(bias + panel * PANEL + v);
                    store(to + v, fma(sum, scale, load(to + v)));
                }
            }
        });
    }

    // With `few`, only the sampled rows get an attention; all rows' keys and values are kept.
    void attention(const HarnessLayer& layer, bool few) {
        const int hidden = model_->hidden, dim = model_->head_dim;
        normalise(layer.attention_norm, all_);
        watch.end(NORMS);
        multiply<E>(weights(layer.qkv, qkv_width_, hidden), normed_.get(), all_.tiling, panels_,
                    keep(qkv_.get(), qkv_width_, layer.qkv_bias));
        watch.end(QKV);
        const Cache held = cache(layer);
        const bool together = model_->norms_all_heads;
        const float *query_norm = together ? nullptr : layer.query_norm, *key_norm = together ? nullptr : layer.key_norm;
#pragma omp for
        for (int row = 0; row < pass_->tokens; ++row) {
            const int position = position_[row], number = few ? number_[row] : row;
            if (row + 1 < pass_->tokens) fetch_place<E>(shape_, block_of(row + 1), offset_of(row + 1), held);
            float* from = qkv_.get() + static_cast<std::size_t>(row) * qkv_width_;
            const float* cosine = model_->cosines + static_cast<std::size_t>(position) * (dim / 2);
            const float* sine = model_->sines + static_cast<std::size_t>(position) * (dim / 2);
            if (together) {
                if (number >= 0) normalise(from, layer.query_norm, query_width_);
                normalise(from + query_width_, layer.key_norm, key_width_);
            }
            for (int head = number < 0 ? model_->heads : 0; head < model_->heads + model_->kv_heads; ++head)
                rotate(from + head * dim, head < model_->heads ? query_norm : key_norm, cosine, sine, dim,
                       model_->epsilon);
            if (number >= 0) {
                Raw* to = query_.get() + static_cast<std::size_t>(number) * query_width_;
                for (int i = 0; i < query_width_; i += LANES) E::store(to + i, load(from + i));
            }
            const float* key = from + query_width_;
            remember<E>(key, key + key_width_, shape_, block_of(row), offset_of(row), held);
        }
        watch.end(ROTARY);
        const Rows& rows = few ? sampled_ : all_;
        const std::vector<Chunk>& chunks = few ? sampled_chunks_ : chunks_;
        const std::vector<Task>& tasks = few ? sampled_tasks_ : tasks_;
        const int count = static_cast<int>(tasks.size());
#pragma omp for schedule(dynamic, 1)
        for (int t = 0; t < count; ++t)
            attend<E>(tasks[t], chunks[tasks[t].chunk], shape_, held, query_.get(), attended_.get(), rows.tiling);
        watch.end(ATTENTION);
        add(weights(layer.output, hidden, query_width_), attended_.get(), layer.output_bias, layer.attended_norm, rows);
        watch.end(OUTPUT);
    }

    void mlp(const HarnessLayer& layer, const Rows& rows) {
        const int hidden = model_->hidden, intermediate = model_->intermediate;
        normalise(layer.mlp_norm, rows);
        watch.end(NORMS);
        // A panel is a vector of columns of the gate, then the same columns of the other projection.
        const auto gate_up = [&](auto activation) {
            multiply<E>(weights(layer.gate_up, 2 * intermediate, hidden), normed_.get(), rows.tiling, panels_,
                        [&](const float* sums, int start, int height, int panel) {
                            Word* tile = middle_.get() + static_cast<std::size_t>(start) * (intermediate / E::HELD);
                            for (int r = 0; r < height; ++r) {
                                const Floats gate = load(sums + r * PANEL), up = load(sums + r * PANEL + LANES);
                                put<E>(row_of_tile(tile, r, height, intermediate / E::HELD), panel * LANES,
                                       activation(gate) * up);
                            }
                        });
        };
        if (model_->gelu)
            gate_up([](Floats gate) { return gelu(gate); });
        else
            gate_up([](Floats gate) { return silu(gate); });
        watch.end(GATE_UP);
        add(weights(layer.down, hidden, intermediate), middle_.get(), nullptr, layer.mlp_out_norm, rows);
        watch.end(DOWN);
    }

    void score_vocabulary() {
        const int vocab = model_->vocab, rows = pass_->rows;
        normalise(model_->norm, sampled_);
        watch.end(NORMS);
        // Each thread keeps, for each row and lane, the highest logit that it met and whose it is.
        const std::size_t candidates = static_cast<std::size_t>(rows) * LANES;
        float* best = best_.get() + omp_get_thread_num() * candidates;
        Word* best_id = best_id_.get() + omp_get_thread_num() * candidates;
        std::fill(best, best + candidates, -std::numeric_limits<float>::infinity());
        std::fill(best_id, best_id + candidates, NONE);
        multiply<E>(weights(model_->head, vocab, model_->hidden), normed_.get(), sampled_.tiling, panels_,
                    [&](const float* sums, int start, int height, int panel) {
                        for (int r = 0; r < height; ++r) {
                            const std::size_t row = start + r;
                            Floats top = load(best + row * LANES);
                            Words top_id = load(best_id + row * LANES);
                            for (int v = 0; v < PANEL; v += LANES) {
                                const int id = panel * PANEL + v;
                                const Mask real = first_lanes(vocab - id);
                                const Floats logit = load(sums + r * PANEL + v);
                                const Mask better = higher(real, logit, top);
                                top = select(better, logit, top);
                                top_id = select(better, numbers() + id, top_id);
                                if (pass_->logits) store(pass_->logits + row * vocab + id, real, logit);
                            }
                            store(best + row * LANES, top);
                            store(best_id + row * LANES, top_id);
                        }
                    });
    }

    // The highest logit of each row, the lowest id among equals.
    void choose() {
        const int threads = omp_get_num_threads();
#pragma omp for
        for (int row = 0; row < pass_->rows; ++row) {
            float top = -std::numeric_limits<float>::infinity();
            Word id = NONE;
            for (int thread = 0; thread < threads; ++thread)
                for (int lane = 0; lane < LANES; ++lane) {
                    const std::size_t at = (static_cast<std::size_t>(thread) * pass_->rows + row) * LANES + lane;
                    const float logit = best_.get()[at];
                    const Word whose = best_id_.get()[at];
                    if (whose == NONE) continue;
                    if (logit > top || (logit == top && whose < id)) {
                        top = logit;
                        id = whose;
                    }
                }
            pass_->next_ids[row] = id == NONE ? -1 : static_cast<std::int64_t>(id);
        }
    }

    // What RMSNorm multiplies a row by, beside the weights.
    float norm_factor(const float* row, int width) const {
        Floats squares{};
        for (int i = 0; i < width; i += LANES) {
            const Floats x = load(row + i);
            squares = fma(x, x, squares);
        }
        const float mean = sum_of(squares) / width;
        return 1.0f / std::sqrt(mean + model_->epsilon);
    }

    // RMSNorm of rows of the residual stream, into tiles; without weights the rows as they are.
    void normalise(const float* weight, const Rows& rows) {
        const int hidden = model_->hidden;
#pragma omp for
        for (int r = 0; r < rows.tiling.rows; ++r) {
            const float* row = residual(rows.at(r));
            const RowWords to = row_words(normed_.get(), rows.tiling, r, hidden / E::HELD);
            if (!weight) {
                for (int i = 0; i < hidden; i += LANES) put<E>(to, i, load(row + i));
                continue;
            }
            const Floats factor = every(norm_factor(row, hidden));
            for (int i = 0; i < hidden; i += LANES) put<E>(to, i, load(row + i) * factor * load(weight + i));
        }
    }

    // Adds the RMSNorm of the product that is kept to the residual stream.
    void add_normalised(const float* weight, const Rows& rows) {
        const int hidden = model_->hidden;
#pragma omp for
        for (int r = 0; r < rows.tiling.rows; ++r) {
            const float* row = product_.get() + static_cast<std::size_t>(r) * product_width_;
            float* to = residual(rows.at(r));
            const Floats factor = every(norm_factor(row, hidden) * model_->residual_scale);
            for (int i = 0; i < hidden; i += LANES)
                store(to + i, fma(load(row + i) * factor, load(weight + i), load(to + i)));
        }
    }

    // RMSNorm in place.
    void normalise(float* row, const float* weight, int width) const {
        const Floats factor = every(norm_factor(row, width));
        for (int i = 0; i < width; i += LANES) store(row + i, load(row + i) * factor * load(weight + i));
    }

    // Normalises a head where its model does, then turns it by its position.
    static void rotate(float* head, const float* weight, const float* cosine, const float* sine, int dim,
                       float epsilon) {
        if (weight) {
            float squares = 0;
            for (int i = 0; i < dim; ++i) squares += head[i] * head[i];
            const float factor = 1.0f / std::sqrt(squares / dim + epsilon);
            for (int i = 0; i < dim; ++i) head[i] = head[i] * factor * weight[i];
        }
        const int half = dim / 2;
        for (int i = 0; i < half; ++i) {
            const float a = head[i], b = head[i + half];
            head[i] = a * cosine[i] - b * sine[i];
            head[i + half] = b * cosine[i] + a * sine[i];
        }
    }

    const HarnessModel* model_ = nullptr;
    const HarnessPass* pass_ = nullptr;
    Shape shape_{};
    Rows all_{Tiling(), nullptr}, sampled_{Tiling(), nullptr};
    bool few_ = false;  // whether fewer rows are sampled than there are tokens
    int query_width_ = 0, key_width_ = 0, qkv_width_ = 0, product_width_ = 0;
    Tasks panels_;
    std::vector<Chunk> chunks_, sampled_chunks_;
    std::vector<Task> tasks_, sampled_tasks_;
    std::vector<int> owner_, position_;  // of each row: its chunk, and its place in the sequence
    std::vector<int> number_;            // of each row: which of the sampled ones it is, or -1
    Buffer<float> residual_, qkv_, product_;
    Buffer<Raw> query_;
    Buffer<Word> normed_, attended_, middle_;
    Buffer<float> best_;
    Buffer<Word> best_id_;
};

}  // namespace
}  // namespace harness

#pragma GCC visibility push(default)
extern "C" {

// Lays out weights [columns, depth words] as panels; columns missing in the last panel are zero. Each thread writes
// those that it will read first (Tasks), on the core where it will, so that the system puts them into memory near it.
void harness_pack(const Word* weights, std::int32_t columns, std::int32_t words, Word* packed, std::int32_t threads) {
    using harness::PANEL;
    const int panels = harness::panels_of(columns);
    const harness::Cores cores(threads);
#pragma omp parallel num_threads(threads)
    {
        cores.bind();
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        const int end = harness::part_of(panels, thread + 1, team);
        for (int panel = harness::part_of(panels, thread, team); panel < end; ++panel) {
            Word* to = packed + static_cast<std::size_t>(panel) * PANEL * words;
            for (int k = 0; k < words; ++k)
                for (int c = 0; c < PANEL; ++c) {
                    const int column = panel * PANEL + c;
                    *to++ = column < columns ? weights[static_cast<std::size_t>(column) * words + k] : 0;
                }
        }
    }
}

// Columns of a panel.
std::int32_t harness_panel() { return harness::PANEL; }

// A place for the working memory of passes, one at a time; null where the system keeps AMX from this process.
void* harness_new(std::int32_t bfloat16) {
#ifdef __AMX_BF16__
    if (!bfloat16 || !harness::allow_amx()) return nullptr;
#else
    if (!bfloat16) return new (std::nothrow) harness::ForwardOf<harness::Float32>;
#endif
    return new (std::nothrow) harness::ForwardOf<harness::BFloat16>;
}

// Writes to the first `words` of each layer's keys and values, so that the memory is there before the clock starts. Each
// thread writes a part of all of them: any thread may read any block, and so each layer's lie on all NUMA nodes alike.
void harness_touch(const HarnessModel* model, std::int64_t words, std::int32_t threads) {
    const harness::Cores cores(threads);
#pragma omp parallel num_threads(threads)
    {
        cores.bind();
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        const std::int64_t begin = words * thread / team, end = words * (thread + 1) / team;
        for (int piece = 0; piece < 2 * model->layer_count; ++piece) {
            const HarnessLayer& layer = model->layers[piece / 2];
            Word* to = piece % 2 ? layer.values : layer.keys;
            std::memset(to + begin, 0, static_cast<std::size_t>(end - begin) * sizeof(Word));
        }
    }
}

// Seconds of each stage of all passes so far; zeros where the library is not compiled to be profiled.
const double* harness_stages(void* forward) { return static_cast<harness::Forward*>(forward)->watch.seconds; }

void harness_delete(void* forward) { delete static_cast<harness::Forward*>(forward); }

// Returns 0, or 1 where memory ran out.
std::int32_t harness_forward(void* forward, const HarnessModel* model, const HarnessPass* pass, std::int32_t threads) {
    try {
        static_cast<harness::Forward*>(forward)->run(*model, *pass, threads);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
}

#pragma GCC visibility pop
