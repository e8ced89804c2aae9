//! Runs the models. Those that must fail show that the models can, and what the product does about it.

macro_rules! holds {
    ($($model:ident),* $(,)?) => { $(
        #[test]
        fn $model() {
            umem_test_models::$model();
        }
    )* };
}

holds!(
    two_faults_of_one_unit,
    two_readers,
    a_fault_beside_a_block_that_leaves,
    a_discard_of_a_unit_that_comes,
    a_discard_of_a_part_of_a_unit_that_comes,
    a_discard_while_what_was_landing_is_given_up,
    pages_that_come_twice,
    a_discarded_page_that_comes_twice,
    neighbours_that_are_complete_at_once,
    blocks_that_are_complete_at_once,
    a_page_that_two_lanes_claim,
    a_block_that_two_lanes_look_for,
    acknowledged_pages_are_freed_once,
);

#[test]
#[should_panic(expected = "a vCPU waits for ever")]
fn two_faults_of_one_unit_by_state_alone_lose_a_wake() {
    umem_test_models::two_faults_of_one_unit_by_state_alone_lose_a_wake();
}

#[test]
#[should_panic(expected = "page 1")]
fn a_discard_without_the_gate() {
    umem_test_models::a_discard_without_the_gate();
}
