// Activations of tiles in f32 and f16: read when they are shared, as there are too many to keep on their way.
struct Activations {
    none: u32,
}

fn load_x(base: u32, c: u32) -> Activations {
    return Activations();
}
