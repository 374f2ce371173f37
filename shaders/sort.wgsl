// Sorts SORTED numbers with their places in workgroup memory: largest first, of equal ones the first, then
// places that hold nothing (bitonic sort; Batcher 1968).

const THREADS = 256u;
const NONE = 0xFFFFFFFFu;

var<workgroup> numbers: array<f32, SORTED>;
var<workgroup> places: array<u32, SORTED>;
var<workgroup> partial: array<f32, THREADS>;

fn is_before(a: u32, b: u32) -> bool {
    let x = numbers[a];
    let y = numbers[b];
    return places[a] != NONE && (places[b] == NONE || x > y || (x == y && places[a] < places[b]));
}

fn sort(index: u32) {
    for (var size = 2u; size <= SORTED; size <<= 1u) {
        for (var distance = size >> 1u; distance > 0u; distance >>= 1u) {
            workgroupBarrier();
            for (var pair = index; pair < SORTED / 2u; pair += THREADS) {
                let a = 2u * pair - (pair & (distance - 1u));
                let b = a + distance;
                // Every other run is sorted backwards.
                if select(is_before(a, b), is_before(b, a), (a & size) == 0u) {
                    let number = numbers[a];
                    numbers[a] = numbers[b];
                    numbers[b] = number;
                    let place = places[a];
                    places[a] = places[b];
                    places[b] = place;
                }
            }
        }
    }
    workgroupBarrier();
}

// The sum over all threads, in one order; thread 0 has it.
fn total(index: u32, mine: f32) -> f32 {
    partial[index] = mine;
    for (var distance = THREADS / 2u; distance > 0u; distance >>= 1u) {
        workgroupBarrier();
        if index < distance {
            partial[index] += partial[index + distance];
        }
    }
    return partial[0];
}
