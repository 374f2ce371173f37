// Four bits of a word for each of four words, from bit `first` on, each as bit 4 of a byte.
fn fifth_bits(word: u32, first: u32) -> vec4<u32> {
    let b = vec4<u32>(word) >> (vec4<u32>(0u, 4u, 8u, 12u) + vec4<u32>(first));
    return ((b & vec4<u32>(1u)) << vec4<u32>(4u)) | ((b & vec4<u32>(2u)) << vec4<u32>(11u))
        | ((b & vec4<u32>(4u)) << vec4<u32>(18u)) | ((b & vec4<u32>(8u)) << vec4<u32>(25u));
}
