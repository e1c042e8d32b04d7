//! What a worker writes of itself into discovery, as Dynamo 1.6 has it.

/// Key and value of the instance of `dynamo.backend.generate` with that id.
pub fn instance(id: u64) -> (String, String) {
    let value = format!(
        r#"{{"type":"Endpoint","component":"backend","endpoint":"generate","namespace":"dynamo","instance_id":{id},"transport":{{"tcp":"192.0.2.2:34245/{id:x}/dynamo/backend/generate"}},"device_type":"cuda","request_plane_codec":"msgpack"}}"#
    );
    (format!("v1/instances/dynamo/backend/generate/{id:x}"), value)
}

/// Key and value of its model card, which says how many KV blocks and slots it has.
pub fn card(id: u64, blocks: u64, slots: u64) -> (String, String) {
    let value = format!(
        r#"{{"type":"Model","namespace":"dynamo","component":"backend","endpoint":"generate","instance_id":{id},"card_json":{{"display_name":"tiny/model","slug":"tiny_model","kv_cache_block_size":16,"model_type":"Chat","worker_type":"aggregated","runtime_config":{{"total_kv_blocks":{blocks},"max_num_seqs":{slots},"max_num_batched_tokens":8192,"data_parallel_start_rank":0,"data_parallel_size":1}}}}}}"#
    );
    (format!("v1/mdc/dynamo/backend/generate/{id:x}"), value)
}
