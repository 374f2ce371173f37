// Every kernel begins with this: what the rows of a pass share. Loops that begin at 0 and take a fixed,
// small number of turns are written out before a shader is compiled (kernels.rs).

// Words of the pass: tokens; positions; for each row the number of tree rows that it sees and their places
// in the tree, four to a word; rotations; indices; sinks of attention. Kernels are told where.
@group(1) @binding(1) var<storage, read> data: array<u32>;
