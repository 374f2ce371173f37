// A sink is a score that takes part in the softmax of a head and has no value.

const NO_SINKS = 0xFFFFFFFFu;

// The sum of the weights of a head, relative to the largest score, with that of its sink.
fn with_sink(total: f32, most: f32, head: u32) -> f32 {
    if params.sinks_at == NO_SINKS {
        return total;
    }
    return total + exp(bitcast<f32>(data[params.sinks_at + head]) - most);
}
