//! Runs the models. Models that must fail show that the checks can fail, and which measure of the product prevents the
//! failure.

macro_rules! holds {
    ($($model:ident),* $(,)?) => { $(
        #[test]
        fn $model() {
            umem_test_models::$model();
        }
    )* };
}

holds!(
    both_faults_of_one_unit_are_woken,
    two_fault_threads_lose_no_wake,
    fault_of_a_block_being_unregistered_is_woken,
    discard_of_a_landing_unit_reads_as_zeroes,
    partial_discard_of_a_landing_unit_reads_as_zeroes,
    discard_during_a_rollback_is_kept,
    duplicate_pages_land_once,
    duplicate_discarded_page_lands_once,
    neighbouring_blocks_completed_together_are_unregistered,
    blocks_completed_together_are_unregistered,
    page_claimed_by_two_lanes_is_sent_once,
    block_sought_by_two_lanes_is_taken_once,
    acknowledged_pages_are_freed_once,
);

#[test]
#[should_panic(expected = "a vCPU waits forever")]
fn two_faults_of_one_unit_by_state_alone_lose_a_wake() {
    umem_test_models::two_faults_of_one_unit_by_state_alone_lose_a_wake();
}

#[test]
#[should_panic(expected = "page 1")]
fn discard_without_the_gate_leaks_old_contents() {
    umem_test_models::discard_without_the_gate_leaks_old_contents();
}
