// The four weights of group i, 256 times as large: see cast_f16.wgsl.
fn halves4(chunk: Chunk, i: u32) -> vec4<f16> {
    let q = vec4<f16>(unpack4xI8(chunk.q[i]));
    return fma(q, vec4<f16>(f16(chunk.scale[i >> 2u] * 256.0)),
               vec4<f16>(f16(chunk.minimum[i >> 2u] * 256.0)));
}
